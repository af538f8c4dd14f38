"""ReadOnlyTensor: values that are computed on each access, so that writing to them would be lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_SETTERS = (Tensor.data.__set__, Tensor.__setitem__)  # type: ignore[attr-defined]
_OPERATORS = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift"
_IN_PLACE_OPERATORS = {f"__i{name}__" for name in _OPERATORS.split()}


class ReadOnlyTensor(Tensor):
    """A tensor that raises where it, or a view of it, is written to. What is computed from it is an ordinary tensor."""

    @classmethod
    def of(cls, values: Tensor) -> Tensor:
        """`values`, read-only. Compiled graphs get an ordinary tensor: they hold no code that would write to it."""
        return values if torch.compiler.is_compiling() else values.as_subclass(cls)

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
        written = kwargs.get("out", args[0] if args and (in_place or func in _SETTERS) else None)
        all_written = written if isinstance(written, (list, tuple)) else [written]  # torch._foreach_* take lists
        if name != "requires_grad_" and any(isinstance(tensor, cls) for tensor in all_written):
            raise RuntimeError(
                f"{name}: the weight of a LinearNF4 must not be written to, since it is dequantized on each access and "
                "the change would be lost; put an nn.Linear in the layer's place, or merge with qlora_kernels.peft"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if type(result) is Tensor and _is_view(result, args):
            return result.as_subclass(cls)
        if name in ("numpy", "__array__"):
            result.flags.writeable = False
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _is_view(result: Tensor, args: tuple[Any, ...]) -> bool:
    source = args[0] if args else None
    if not isinstance(source, ReadOnlyTensor) or result.is_meta or result.layout != torch.strided:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return bool(result.untyped_storage()._cdata == source.untyped_storage()._cdata)
