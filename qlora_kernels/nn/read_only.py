"""ReadOnlyTensor: a tensor of values that are computed on each access; writes to it raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SETTERS = (Tensor.data.__set__, Tensor.__setitem__)  # type: ignore[attr-defined]
_OPERATORS = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift"
_IN_PLACE_OPERATORS = {f"__i{name}__" for name in _OPERATORS.split()}


class ReadOnlyTensor(Tensor):
    """A tensor that raises if it, or a view of it, is written to. Results computed from it are ordinary tensors."""

    @classmethod
    def of(cls, values: Tensor) -> Tensor:
        """Return `values` as a read-only tensor.

        Under a compiler or a dispatch mode, which record operations, and for subclasses of Tensor, `values` is returned
        unchanged.
        """
        recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        return values if recorded or type(values) is not Tensor else values.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
        in_place = in_place or func in _SETTERS or bool(getattr(getattr(func, "_schema", None), "is_mutable", False))
        targets = (args[:1] or tuple(kwargs.values())) if in_place else ()  # torch.nn.init passes keywords
        written = [kwargs.get("out"), *targets]
        all_written = [t for item in written for t in (item if isinstance(item, (list, tuple)) else [item])]
        if name != "requires_grad_" and any(isinstance(t, cls) and not _is_parameter(t) for t in all_written):
            raise RuntimeError(
                f"{name}: the weight of a LinearNF4 must not be written to, since it is dequantized on each access and "
                "the change would be lost; put an nn.Linear in the layer's place, or merge with qlora_kernels.peft"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, (list, tuple)) and any(_is_view(item, args) for item in result):
            return type(result)([item.as_subclass(cls) for item in result])
        if _is_view(result, args):
            return result.as_subclass(cls)
        if name in ("numpy", "__array__"):
            result.flags.writeable = False
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return nn.Parameter(self.detach().clone(), self.requires_grad) if _is_parameter(self) else self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)


def _is_parameter(tensor: Tensor) -> bool:
    """Whether `tensor` was made a parameter by nn.Parameter; its owner may write to it."""
    return hasattr(tensor, "_is_param")


def _is_view(result: Any, args: tuple[Any, ...]) -> bool:
    source = args[0] if args else None
    if type(result) is not Tensor or not isinstance(source, ReadOnlyTensor):
        return False
    if result.is_meta or result.layout != torch.strided:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return bool(result.untyped_storage()._cdata == source.untyped_storage()._cdata)
