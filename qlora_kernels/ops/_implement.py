"""Registration of an op's implementation, of its fake and of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Takes = tuple[type, ...]
"""A function's positional arguments: bundles of _operands.py, and Tensor for what is one argument to the op too."""

DEVICES = ("cpu", "cuda")
"""Both dispatch keys lead to `select`, because Triton and CUDA share one."""


_kernels: dict[str, Callable[..., Any]] = {}
"""By op, what `implement` registered."""


def implement(qualname: str, takes: Takes = ()) -> Callable[[Function], Function]:
    """Register the decorated function as `qualname` on every device, and return it unchanged."""

    def register(function: Function) -> Function:
        _kernels[qualname] = spread(function, takes)
        torch.library.impl(qualname, DEVICES, _kernels[qualname])
        return function

    return register


def fake(qualname: str, takes: Takes = ()) -> Callable[[Function], Function]:
    """Register the decorated function as the shape-only form of `qualname`, and return it unchanged."""

    def register(function: Function) -> Function:
        torch.library.register_fake(qualname, spread(function, takes))
        return function

    return register


def spread(function: Callable[..., Any], takes: Takes) -> Callable[..., Any]:
    """`function` for a caller that has the fields of its bundles side by side, as a schema has them."""
    if not takes:
        return function
    parts: list[tuple[Any, Any]] = []
    start = 0
    for kind in takes:
        fields = getattr(kind, "_fields", None)
        parts.append((None, start) if fields is None else (kind, slice(start, start + len(fields))))
        start += 1 if fields is None else len(fields)

    def flat(*args: Any, **keywords: Any) -> Any:
        return function(*[kind._make(args[at]) if kind else args[at] for kind, at in parts], **keywords)

    return flat


def save(ctx: Any, *operands: Any) -> None:
    """Keep operands for backward, bundles spread: tensors where autograd sees them, numbers beside them."""
    ctx.save_for_backward(*[operand if isinstance(operand, Tensor) else None for operand in operands])
    ctx.numbers = [None if isinstance(operand, Tensor) else operand for operand in operands]


def saved(ctx: Any) -> list[Any]:
    """The operands of `save`."""
    tensors = ctx.saved_tensors
    return [number if tensor is None else tensor for tensor, number in zip(tensors, ctx.numbers, strict=True)]


def differentiate(
    qualname: str, backward: Callable[..., Any], *, setup_context: Callable[..., None], wanted: Sequence[int]
) -> None:
    """Register the gradient of `qualname`, an implemented op without keyword-only and default arguments and aliases.

    wanted: places of the arguments that have a gradient, tensors or None; the others are constants.
    setup_context(ctx, args, output).   backward(ctx, *grads) -> a gradient or None for each of `wanted`, in the order
    of which ctx.needs_input_grad counts too.

    torch.library.register_autograd registers the same, but reads the op's schema on each call to fill in defaults,
    which takes longer than a small layer's product. For the same reason the kernel is called without a second turn of
    the dispatcher wherever that turn would find nothing on its way to it: no mode, transform or subclass.
    """
    namespace, name = qualname.split("::")
    op = getattr(getattr(torch.ops, namespace), name).default
    kernel = _kernels[qualname]

    def run_below(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset.raw_repr() & _BELOW_AUTOGRAD in _BACKEND_ALONE:
                return kernel(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *_, args, keyset = inputs
        output = run_below(keyset, args)
        setup_context(ctx, args, output)
        return output

    def backward_of_all(ctx: Any, *grads: Tensor | None) -> Any:
        return *backward(ctx, *grads), None, None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    node: Any = type(f"{name}_", (torch.autograd.Function,), methods)

    def autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            inputs = [args[place] for place in wanted]
            if any(tensor is not None and tensor.requires_grad for tensor in inputs):
                return node.apply(*inputs, args, keyset)
        return run_below(keyset, args)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


_Key, _KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
# ADInplaceOrView stands in every keyset, for ops that write or alias; these do neither.
_BELOW_AUTOGRAD: int = torch._C._after_autograd_keyset.remove(_Key.ADInplaceOrView).raw_repr()
_BACKEND_ALONE = tuple(_KeySet(key).raw_repr() for key in (_Key.CPU, _Key.CUDA))

_autograd_kernels = torch.library.Library("qlora_kernels", "IMPL")  # type: ignore[no-untyped-call]
