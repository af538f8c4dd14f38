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


def implement(qualname: str, takes: Takes = ()) -> Callable[[Function], Function]:
    """Register the decorated function as `qualname` on every device, and return it unchanged."""

    def register(function: Function) -> Function:
        torch.library.impl(qualname, DEVICES, spread(function, takes))
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
    parts: list[tuple[Any, int, int]] = []
    for kind in takes:
        start = parts[-1][2] if parts else 0
        fields = getattr(kind, "_fields", None)
        parts.append((None, start, start + 1) if fields is None else (kind, start, start + len(fields)))

    def flat(*args: Any, **keywords: Any) -> Any:
        bundled = [kind(*args[start:stop]) if kind else args[start] for kind, start, stop in parts]
        return function(*bundled, **keywords)

    return flat


def save(ctx: Any, *operands: Any) -> None:
    """Keep operands for backward, bundles spread: tensors where autograd sees them, numbers beside them."""
    ctx.save_for_backward(*(operand if isinstance(operand, Tensor) else None for operand in operands))
    ctx.numbers = [None if isinstance(operand, Tensor) else operand for operand in operands]


def saved(ctx: Any) -> list[Any]:
    """The operands of `save`."""
    tensors = ctx.saved_tensors
    return [number if tensor is None else tensor for tensor, number in zip(tensors, ctx.numbers, strict=True)]


def differentiate(qualname: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """Register the gradient of `qualname`, an op without keyword-only and default arguments, Tensor lists and aliases.

    setup_context(ctx, inputs, output), backward(ctx, *grads): as torch.library.register_autograd takes them. That
    function registers the same, but reads the op's schema on each call to fill in defaults, which takes longer than a
    small layer's product.
    """
    namespace, name = qualname.split("::")
    op = getattr(getattr(torch.ops, namespace), name).default

    def run_below(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *args, keyset = inputs  # the op's own come first: ctx.needs_input_grad counts them
        output = run_below(keyset, args)
        setup_context(ctx, args, output)
        return output

    def backward_of_all(ctx: Any, *grads: Tensor | None) -> Any:
        return *backward(ctx, *grads), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    node: Any = type(f"{name}_", (torch.autograd.Function,), methods)

    def autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return node.apply(*args, keyset)
        return run_below(keyset, args)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


_autograd_kernels = torch.library.Library("qlora_kernels", "IMPL")  # type: ignore[no-untyped-call]
