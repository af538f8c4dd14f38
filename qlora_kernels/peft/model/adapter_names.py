"""Checks of adapter_names against the rows of a call, and their expansion for generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..core.adapter_selection import BASE
from ..framework.injector import Injector
from ..framework.method import methods_of

_INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids")


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the number of rows of the call's input: of transformers' input by name, else of the first tensor, else
    None.
    """
    named = [kwargs[name] for name in _INPUTS if name in kwargs]
    tensors = (value for value in (*args, *named, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0)
    first = next(tensors, None)
    return None if first is None else first.shape[0]


def check_rows(injector: Injector, adapter_names: Sequence[str], batch: int | None) -> None:
    """Raise ValueError if the number of names differs from the number of rows, or an adapter cannot be used by row."""
    if batch is not None and len(adapter_names) != batch:
        raise ValueError(f"adapter_names: must be one per row of the batch, {batch}, got {len(adapter_names)}")
    for name in dict.fromkeys(name for name in adapter_names if name != BASE):
        for method in methods_of(injector, name):
            if reason := method.row_mixing_unsupported():
                raise ValueError(
                    f"adapter_names: each adapter must be able to serve single rows, got {name!r}, which cannot serve "
                    f"single rows: {reason}; run its rows in a batch of their own"
                )
    active = [method for name in injector.selection.active for method in methods_of(injector, name)]
    if injector.selection.state.enabled and any(method.overrides.paths for method in active):
        raise ValueError(
            f"adapter_names: no active adapter may replace the model's own parameters, got {injector.selection.active} "
            "with an adapter that does; activate other adapters by set_adapter"
        )


def expanded_rows(rows: tuple[str, ...] | None, model: nn.Module, kwargs: dict[str, Any]) -> tuple[str, ...] | None:
    """Return `rows` expanded to the rows of the layers' inputs while `model` generates with the arguments `kwargs`.

    generate repeats each row for every beam or returned sequence. In a decoder this happens before the first step. An
    encoder computes each row once, and the layers of its decoder expand the names themselves.
    """
    if rows is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return rows
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    wanted = [kwargs.get(name, getattr(config, name, None)) or 1 for name in ("num_beams", "num_return_sequences")]
    return tuple(name for name in rows for _ in range(max(wanted)))
