"""Registration of an op's implementation, of its fake and of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])

DEVICES = ("cpu", "cuda")
"""Both dispatch keys lead to `select`, because Triton and CUDA share one."""


def implement(qualname: str) -> Callable[[Function], Function]:
    """Register the decorated function as `qualname` on every device, and return it unchanged."""

    def register(function: Function) -> Function:
        torch.library.impl(qualname, DEVICES, function)
        return function

    return register


def fake(qualname: str) -> Callable[[Function], Function]:
    """Register the decorated function as the shape-only form of `qualname`, and return it unchanged."""

    def register(function: Function) -> Function:
        torch.library.register_fake(qualname, function)
        return function

    return register


def differentiate(qualname: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """Register the gradient of `qualname`, an op without default arguments, Tensor lists and aliases.

    backward, setup_context: as torch.library.register_autograd takes them. That function registers the same, but reads
    the op's schema on each call to fill in defaults, which takes longer than a small layer's product.
    """
    namespace, name = qualname.split("::")
    op = getattr(getattr(torch.ops, namespace), name).default

    def run_below(keyset: Any, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **keywords)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *args, keyset, keywords = inputs  # the op's own come first: ctx.needs_input_grad counts them
        output = run_below(keyset, args, keywords)
        setup_context(ctx, args, keywords, output)
        return output

    def backward_of_all(ctx: Any, *grads: Tensor | None) -> Any:
        return *backward(ctx, *grads), None, None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    node: Any = type(f"{name}_", (torch.autograd.Function,), methods)

    def autograd(keyset: Any, *args: Any, **keywords: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return node.apply(*args, keyset, keywords)
        return run_below(keyset, args, keywords)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


_autograd_kernels = torch.library.Library("qlora_kernels", "IMPL")  # type: ignore[no-untyped-call]
