"""Registration of an op's implementation, of its fake and of its derivatives.

An op's derivative is an explicit torch.autograd.Function in the file of the op. `differentiate` registers it at the
dispatcher's Autograd key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch_fast_path import call_below_autograd
from .tensor_memory import check_memory

Function = TypeVar("Function", bound=Callable[..., Any])
Takes = tuple[type, ...]
"""The types of a function's positional arguments: bundles of operands.py, Tensor for everything else."""

DEVICES = ("cpu", "cuda")
"""Both dispatch keys lead to `select`, because Triton and CUDA share the key CUDA."""


_kernels: dict[str, Callable[..., Any]] = {}
"""The function that `implement` registered, by op name."""


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
    """Return `function` for callers that pass the fields of its bundles side by side, as a schema lists them.

    It runs without autocast, which would change the dtypes of torch's products inside an op: the dtype of an op's
    result is that of its arguments, and layers cast x before they call one.
    """
    parts: list[tuple[Any, Any]] = []
    start = 0
    for kind in takes:
        fields = getattr(kind, "_fields", None)
        parts.append((None, start) if fields is None else (kind, slice(start, start + len(fields))))
        start += 1 if fields is None else len(fields)

    new = tuple.__new__  # _make would count the fields again, which the schema has done

    def flat(*args: Any, **keywords: Any) -> Any:
        bundled = [new(kind, args[at]) if kind else args[at] for kind, at in parts] if parts else args
        if _is_any_autocast_enabled():
            with torch._C._DisableAutocast():
                return function(*bundled, **keywords)
        return function(*bundled, **keywords)

    return flat


def differentiate(
    qualname: str,
    takes: Takes,
    apply: Callable[..., Any],
    *,
    compose: Callable[..., Any],
    constants: Sequence[str] = (),
) -> None:
    """Register the derivatives of `qualname`, an implemented op without keyword-only and default arguments and aliases.

    takes: the bundles of the op's arguments, as for `implement`; empty if there are none.
    apply(*bundles, run): calls the op's torch.autograd.Function, whose forward computes the op by run(*args) with the
    arguments of the schema. It is called if a gradient is required; otherwise the op runs without the Function.
    compose(*bundles): the op composed of torch's differentiable ops. It runs if a derivative is required that the
    Function does not provide: in forward mode and under the transforms of torch.func.
    constants: names of the arguments that must not require a gradient.

    torch.library.register_autograd would register the same, but it reads the op's schema on each call to fill in
    defaults, which takes longer than a small layer's product.
    """
    name, op, run_below = _op_of(qualname)
    names = [argument.name for argument in op._schema.arguments]
    frozen = _getter([names.index(constant) for constant in constants])
    has_lists = _has_lists(op)
    apply, compose = spread(apply, (*takes, Tensor) if takes else ()), spread(compose, takes)

    def autograd(keyset: Any, *args: Any) -> Any:
        if _transforms_active() or forward_ad._current_level >= 0:
            _check_constants(name, constants, frozen(args))
            return _composed(name, compose, args)
        if torch.is_grad_enabled() and _any_requires_grad(*(_spread_lists(args) if has_lists else args)):
            if _any_requires_grad(*(_spread_lists(frozen(args)) if has_lists else frozen(args))):
                _check_constants(name, constants, frozen(args))
            return apply(*args, partial(run_below, keyset))
        return run_below(keyset, *args)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that returns the elements at `places` as a sequence; itemgetter returns one element bare."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1)) if places else lambda args: ()


def compose_derivatives(qualname: str, takes: Takes, compose: Callable[..., Any]) -> None:
    """Register the derivatives of `qualname`, the gradient of another op, all computed by `compose`.

    takes: as for `differentiate`.   compose(*bundles): the op composed of torch's differentiable ops.
    """
    name, op, run_below = _op_of(qualname)
    has_lists = _has_lists(op)
    compose = spread(compose, takes)

    def autograd(keyset: Any, *args: Any) -> Any:
        if _transforms_active() or forward_ad._current_level >= 0:
            return _composed(name, compose, args)
        if torch.is_grad_enabled() and _any_requires_grad(*(_spread_lists(args) if has_lists else args)):
            return _composed(name, compose, args)
        return run_below(keyset, *args)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)


def refuse_derivatives(qualname: str) -> None:
    """Make `qualname`, which has no derivative, raise if one is required."""
    name, _, run_below = _op_of(qualname)

    def autograd(keyset: Any, *args: Any, **keywords: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        if _requires_grad(tensors) or any(_has_tangent(tensor) for tensor in tensors):
            raise NotImplementedError(f"{name}: no argument may require a gradient or have a tangent; detach() it")
        return run_below(keyset, *args, **keywords)

    _autograd_kernels.impl(name, autograd, "Autograd", with_keyset=True)


def _has_lists(op: Any) -> bool:
    """Whether an argument of the op is a list of tensors."""
    return any("List[" in str(argument.type) for argument in op._schema.arguments)


def _op_of(qualname: str) -> tuple[str, Any, Callable[..., Any]]:
    """Return the op's name without its namespace, its OpOverload, and run(keyset, *args) of `call_below_autograd`."""
    name = qualname.split("::")[1]
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.qlora_kernels, packet), overload or "default")
    return name, op, call_below_autograd(op, _kernels[qualname])


def _composed(name: str, compose: Callable[..., Any], args: Sequence[Any]) -> Any:
    if not _transforms_active():  # under a transform the tensors are wrappers without a storage
        check_memory(name, args)
    return compose(*args)


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
    return forward_ad.unpack_dual(tensor).tangent is not None


_any_requires_grad = torch._C._any_requires_grad
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_transforms_active = torch._C._are_functorch_transforms_active

_autograd_kernels = torch.library.Library("qlora_kernels", "IMPL")
