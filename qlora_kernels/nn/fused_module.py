"""Base class of the modules that fuse_model makes: modules of other libraries whose forward runs on ops.

A fused module is the original object with another class, a subclass of its original one that is made at run time. Its
parameters, names, hooks and state dict do not change. Inputs that the ops do not support run the original forward.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from ..format.quant_state import FLOAT_DTYPES
from .made_class import MadeClass, names_of_class

_DEVICES = ("cpu", "cuda", "meta")


class FusedModule(MadeClass, nn.Module):
    """Base of the mixins that fuse_model puts in front of a module's class."""

    @classmethod
    def members_for(cls, base: type[nn.Module]) -> dict[str, Any]:  # noqa: ARG003
        """Return class attributes that depend on the class that is extended."""
        return {}

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "fused"]))


@cache
def fused_class(mixin: Any, base: Any) -> type[FusedModule]:
    """Return the subclass of `base` whose forward is that of `mixin`, a subclass of FusedModule."""
    members = {**names_of_class(base), **mixin.members_for(base), "made_by": (fused_class, (mixin, base))}
    return cast(type[FusedModule], type(base.__name__, (mixin, base), members))


def unfused_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return `kind` without its fused layers, also below other made classes, or None if they cannot be removed."""
    made = vars(kind).get("made_by")
    if made is None:
        return None if issubclass(kind, FusedModule) else kind
    maker, arguments = made
    if maker is fused_class:
        return unfused_class(arguments[1])
    inner = [unfused_class(argument) if isinstance(argument, type) else argument for argument in arguments]
    return None if None in inner else maker(*inner)


def served(*tensors: Tensor) -> bool:
    """Whether the ops support these tensors: one device of the supported ones, and supported dtypes."""
    first = tensors[0]
    return first.device.type in _DEVICES and all(
        tensor.dtype in FLOAT_DTYPES and tensor.device == first.device for tensor in tensors
    )
