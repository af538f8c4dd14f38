"""Registration of an op's implementation, of its fake and of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._memory import check_memory

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
    qualname: str,
    backward: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
    wanted: Callable[[Sequence[Any]], Sequence[Tensor | None]],
    compose: Callable[..., Any],
    constants: Sequence[str],
) -> None:
    """Register the derivatives of `qualname`, an implemented op without keyword-only and default arguments and aliases.

    backward(ctx, *grads) -> a gradient or None for each of `wanted`, in the order of which ctx.needs_input_grad counts.
    setup_context(ctx, args, output).   wanted(args) -> the tensors, or None, that have a gradient.
    compose: the op in torch's own differentiable ops. It runs where a derivative is asked for that `backward` does not
        give: in forward mode and under the transforms of torch.func.
    constants: names of the arguments that must not require a gradient.

    torch.library.register_autograd registers the same, but reads the op's schema on each call to fill in defaults,
    which takes longer than a small layer's product. For the same reason the kernel is called without a second turn of
    the dispatcher wherever that turn would find nothing on its way to it: no mode, transform or subclass.
    """
    name = qualname.split("::")[1]
    op = getattr(torch.ops.qlora_kernels, name).default
    run_below = _below_autograd(qualname)
    names = [argument.name for argument in op._schema.arguments]
    frozen = itemgetter(*[names.index(constant) for constant in constants])

    def forward(ctx: Any, *inputs: Any) -> Any:
        *_, args, keyset = inputs
        output = run_below(keyset, args)
        setup_context(ctx, args, output)
        # A list among the outputs is spread for autograd, and gathered again below.
        return (*output[0], *output[1:]) if isinstance(output, tuple) and isinstance(output[0], list) else output

    def backward_of_all(ctx: Any, *grads: Tensor | None) -> Any:
        return *backward(ctx, *grads), None, None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    node: Any = type(f"{name}_", (torch.autograd.Function,), methods)
    gathers = str(op._schema.returns[0].type) == "List[Tensor]"
    has_lists = any("List[" in str(argument.type) for argument in op._schema.arguments)

    def autograd(keyset: Any, *args: Any) -> Any:
        if _transforms_active() or forward_ad._current_level >= 0:
            _check_constants(name, constants, frozen(args))
            return _composed(name, compose, args)
        if torch.is_grad_enabled() and _any_requires_grad(*(_spread_lists(args) if has_lists else args)):
            if _any_requires_grad(*(_spread_lists(frozen(args)) if has_lists else frozen(args))):
                _check_constants(name, constants, frozen(args))
            inputs = wanted(args)
            if any(tensor is not None and tensor.requires_grad for tensor in inputs):
                outputs = node.apply(*inputs, args, keyset)
                return (list(outputs[:-1]), outputs[-1]) if gathers else outputs
        return run_below(keyset, args)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def compose_derivatives(qualname: str, compose: Callable[..., Any]) -> None:
    """Register the derivatives of `qualname`, the gradient of another op: `compose` runs where any is asked for.

    compose: the op in torch's own differentiable ops.
    """
    name, run_below = qualname.split("::")[1], _below_autograd(qualname)

    def autograd(keyset: Any, *args: Any) -> Any:
        if _transforms_active() or forward_ad._current_level >= 0 or _requires_grad(args):
            return _composed(name, compose, args)
        return run_below(keyset, args)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def refuse_derivatives(qualname: str) -> None:
    """Make `qualname`, which has no derivative, raise where one is asked for."""
    name = qualname.split("::")[1]
    run_below = _below_autograd(qualname)

    def autograd(keyset: Any, *args: Any, **keywords: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        if _requires_grad(tensors) or any(_has_tangent(tensor) for tensor in tensors):
            raise NotImplementedError(f"{name}: no argument may require a gradient or have a tangent; detach() it")
        return run_below(keyset, args, **keywords)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def _composed(name: str, compose: Callable[..., Any], args: Sequence[Any]) -> Any:
    if not _transforms_active():  # under a transform tensors are wrappers, whose memory is that of others
        check_memory(name, args)
    return compose(*args)


def _below_autograd(qualname: str) -> Callable[..., Any]:
    """run(keyset, args): the op without autograd, without a turn of the dispatcher where that would change nothing."""
    kernel = _kernels[qualname]
    packet, _, overload = qualname.split("::")[1].partition(".")
    op = getattr(getattr(torch.ops.qlora_kernels, packet), overload or "default")

    def run_below(keyset: Any, args: Sequence[Any], **keywords: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset.raw_repr() & _BELOW_AUTOGRAD in _BACKEND_ALONE:
                return kernel(*args, **keywords)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **keywords)

    return run_below


def _check_constants(name: str, constants: Sequence[str], args: Sequence[Any]) -> None:
    for constant, arg in zip(constants, args, strict=True):
        tensors = [item for item in _spread_lists([arg]) if isinstance(item, Tensor) and item.is_floating_point()]
        if _requires_grad(tensors) or any(map(_has_tangent, tensors)):
            raise NotImplementedError(
                f"{name}: {constant} must not require a gradient, which this op does not compute; detach() it"
            )


def _requires_grad(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and bool(_any_requires_grad(*_spread_lists(args)))


def _spread_lists(args: Sequence[Any]) -> list[Any]:
    return [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]


def _has_tangent(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


_any_requires_grad = torch._C._any_requires_grad
_transforms_active = torch._C._are_functorch_transforms_active
_Key, _KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
# ADInplaceOrView stands in every keyset, for ops that write or alias; these do neither.
_BELOW_AUTOGRAD: int = torch._C._after_autograd_keyset.remove(_Key.ADInplaceOrView).raw_repr()
_BACKEND_ALONE = tuple(_KeySet(key).raw_repr() for key in (_Key.CPU, _Key.CUDA))

_autograd_kernels = torch.library.Library("qlora_kernels", "IMPL")  # type: ignore[no-untyped-call]
