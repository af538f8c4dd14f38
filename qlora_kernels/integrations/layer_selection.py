"""Which parameters of a transformers model QLoRAKernelsConfig selects for NF4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.quantizers.base import get_keys_to_not_convert

from ..nn.match import check_names, contained_in
from ..peft.core.config import TASK_HEADS
from .quantization_config import QLoRAKernelsConfig
from .quantized_modules import WEIGHT, dense_linears, expert_stacks

_TASK_HEADS = {head for heads in TASK_HEADS.values() for head in heads}


def chosen_parameters(model: Any, config: QLoRAKernelsConfig, *, heads: bool = True) -> set[str]:
    """Return the names of the weights and expert stacks that `config` selects for NF4.

    heads: whether "lm_head" also stands for the heads of classifiers, which PEFT trains.
    Raises ValueError for a name in skip_modules that matches nothing in the model.
    """
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    wanted = config.named_modules
    check_names("QLoRAKernelsConfig: skip_modules", wanted, [name for name in names if name])
    skip = [*wanted, *_wanted_in_float32(model)]
    if "lm_head" in config.skip_modules:
        skip += ["lm_head", *get_keys_to_not_convert(model)]
        if heads:
            skip += [name for name, _ in model.named_children() if name in _TASK_HEADS]
            skip.append(list(model.state_dict())[-1].rpartition(".")[0])  # the last layer, also if it has a bias
    linears = {f"{name}.{WEIGHT}": name for name in dense_linears(model)}
    tied = {name.removesuffix(f".{WEIGHT}") for pair in _tied(model).items() for name in pair}
    chosen = {w for w, name in linears.items() if not contained_in(skip, name) and name not in tied}
    return chosen | {name for name in expert_stacks(model) if not contained_in(skip, name)}


def _tied(model: Any) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _wanted_in_float32(model: Any) -> Iterator[str]:
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        yield from getattr(model, attribute, None) or ()
