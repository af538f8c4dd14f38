"""Recognition by transformers' Trainer, TRL and accelerate, which ask isinstance(model, peft.PeftModel).

Their answer decides which forward signature is inspected, that checkpoints hold adapters alone and how these are loaded
again, and where DPO's reference comes from. The names that they use then (get_base_model, disable_adapter, set_adapter,
load_adapter, save_pretrained, peft_config, active_adapters) are PeftModel's own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor


class RecognizedAsPeftModel:
    """isinstance(model, peft.PeftModel) is true where peft has been imported, whenever the model was made.

    `__class__` names a class that derives from both, as proxies do it. The model's type is its own, so that nothing of
    PEFT's code runs in it; nothing is imported here.
    """

    @property
    def __class__(self) -> Any:
        theirs = getattr(sys.modules.get("peft"), "PeftModel", None)
        return type(self) if theirs is None else _both(cast(Any, type(self)), theirs)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        object.__dict__["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle compares the class in object's own answer with __class__.
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


def check_save_options(state_dict: Mapping[str, Tensor] | None, safe_serialization: bool) -> None:
    """Raise where save_pretrained is asked for what it does not do."""
    if not safe_serialization:
        raise ValueError("save_pretrained: safe_serialization must be True, got False; pickled files are not written")
    if state_dict is not None:
        raise NotImplementedError(
            "save_pretrained: state_dict must be None, got one; the model's own parameters are saved. Gather sharded "
            "parameters before saving"
        )
