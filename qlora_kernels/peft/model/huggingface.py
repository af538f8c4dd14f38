"""Recognition by transformers' Trainer, TRL and accelerate, which call isinstance(model, peft.PeftModel).

The result determines which forward signature they inspect, whether checkpoints hold only adapters, how checkpoints are
loaded, and which model is DPO's reference. PeftModel has the methods that they then use (get_base_model,
disable_adapter, set_adapter, load_adapter, save_pretrained, peft_config, active_adapters).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn


class RecognizedAsPeftModel:
    """Makes isinstance(model, peft.PeftModel) true if peft has been imported, before or after the model was made.

    As in proxies, `__class__` returns a class that derives from both. The type of the model does not change, so that no
    code of PEFT runs in it. PEFT is not imported here.
    """

    @property
    def __class__(self) -> Any:
        theirs = getattr(sys.modules.get("peft"), "PeftModel", None)
        return type(self) if theirs is None else _both(cast(Any, type(self)), theirs)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        object.__dict__["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle compares the class in the result of object.__reduce_ex__ with __class__.
        _, arguments, *state = cast("tuple[Any, ...]", super().__reduce_ex__(max(int(protocol), 2)))
        return (_new, arguments, *state)


@cache
def _both(ours: Any, theirs: Any) -> Any:
    if issubclass(ours, theirs):
        return ours
    names = {"__module__": ours.__module__, "__qualname__": ours.__qualname__, "__doc__": ours.__doc__}
    return type(ours.__name__, (ours, theirs), names)


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


def warn_of_unshifted_labels(base_model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Warn where transformers' Trainer has taken the labels out of a batch, as label_smoothing_factor makes it do.

    Trainer asks base_model.model for its class, finds no causal model there, and does not shift the labels.
    arguments: of the forward call; Trainer alone gives num_items_in_batch.
    """
    if "num_items_in_batch" in arguments and arguments.get("labels") is None and hasattr(base_model, "model"):
        warnings.warn(
            "Trainer computes the loss itself: with label_smoothing_factor it would not shift the labels of this "
            "model. Use compute_loss_func=functools.partial(LabelSmoother(epsilon=...), shift_labels=True) of "
            "transformers.trainer_pt_utils instead; with a compute_loss_func, this warning does not concern you",
            stacklevel=6,
        )


def check_save_options(state_dict: Mapping[str, Tensor] | None, safe_serialization: bool) -> None:
    """Raise for arguments of save_pretrained that are not supported."""
    if not safe_serialization:
        raise ValueError("save_pretrained: safe_serialization must be True, got False; pickled files are not written")
    if state_dict is not None:
        raise NotImplementedError(
            "save_pretrained: state_dict must be None, got one; the model's own parameters are saved. Gather sharded "
            "parameters before saving"
        )
