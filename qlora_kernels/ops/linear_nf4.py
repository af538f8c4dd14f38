"""linear_nf4: y = x W^T + bias with W in NF4, and grad_x = grad_y W from the same bytes.

Ops: qlora_kernels::linear_nf4 (differentiable in x and bias) and qlora_kernels::linear_nf4_grad_x.

Kernel contract: x [M, K] and grad_y [M, N] contiguous, M, N, K >= 1; weight: Weight, bias [N] or None.
    linear_nf4         run(x, weight, bias) -> y [M, N] of x.dtype
    linear_nf4_grad_x  run(grad_y, weight)  -> grad_x [M, K] of grad_y.dtype
W is used as dequantized to x's dtype, or unrounded in fp32; sums are kept in fp32, and the result is rounded once.
Each of the two is the other's gradient, so derivatives of any order run on the kernels; forward mode and the transforms
of torch.func run on _compose.py.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from . import _compose
from ._checks import check_bias, check_grad_y, check_weight, check_x
from ._implement import differentiate, fake, implement, save, saved, spread
from ._linear import BIAS, CONSTANTS, as_rows, bias_alone, grad_bias, is_empty, matrix, problem_of, save_bias_dtype
from ._operands import Weight, weight_of
from ._registry import select

_FORWARD = (Tensor, Weight, Tensor)
_GRAD_X = (Tensor, Weight)
torch.library.define("qlora_kernels::linear_nf4", f"(Tensor x, {Weight.schema()}, Tensor? bias) -> Tensor")
torch.library.define("qlora_kernels::linear_nf4_grad_x", f"(Tensor grad_y, {Weight.schema()}) -> Tensor")


def linear_nf4(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """y = x @ W.T + bias, where W [N, K] = dequantize_nf4(packed, state, x.dtype) is never stored.

    x: [..., K], fp32, bf16 or fp16, any strides.   packed, state: from `quantize_nf4`, of a two-dimensional weight.
    bias: [N] or None.
    Returns y [..., N] of x.dtype. Differentiable in x and bias; W is a constant.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    """
    y: Tensor = torch.ops.qlora_kernels.linear_nf4(x, *weight_of("linear_nf4", packed, state), bias)
    return y


@implement("qlora_kernels::linear_nf4", _FORWARD)
def linear_nf4_impl(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Checks, then the selected kernel over x as a matrix."""
    _check_linear(x, weight, bias)
    if is_empty(x, weight):
        return bias_alone(x, weight, bias)
    y: Tensor = select(problem_of("linear_nf4", x, weight)).run(matrix(x), weight, bias)
    return as_rows(y, x)


@fake("qlora_kernels::linear_nf4", _FORWARD)
def linear_nf4_fake(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Shape and dtype of y."""
    _check_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.N))


@implement("qlora_kernels::linear_nf4_grad_x", _GRAD_X)
def linear_nf4_grad_x_impl(grad_y: Tensor, weight: Weight) -> Tensor:
    """Checks, then the selected kernel over grad_y as a matrix."""
    _check_grad_x(grad_y, weight)
    if is_empty(grad_y, weight):
        return grad_y.new_zeros((*grad_y.shape[:-1], weight.K))
    grad_x: Tensor = select(problem_of("linear_nf4_grad_x", grad_y, weight)).run(matrix(grad_y), weight)
    return as_rows(grad_x, grad_y)


@fake("qlora_kernels::linear_nf4_grad_x", _GRAD_X)
def linear_nf4_grad_x_fake(grad_y: Tensor, weight: Weight) -> Tensor:
    """Shape and dtype of grad_x."""
    _check_grad_x(grad_y, weight)
    return grad_y.new_empty((*grad_y.shape[:-1], weight.K))


def _composed(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    _check_linear(x, weight, bias)
    return _compose.linear(x, weight, bias)


def _composed_grad_x(grad_y: Tensor, weight: Weight) -> Tensor:
    _check_grad_x(grad_y, weight)
    return _compose.grad_x(grad_y, weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, bias = inputs
    save(ctx, *weight)
    save_bias_dtype(ctx, bias)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_kernels.linear_nf4_grad_x(grad_y, *saved(ctx))
    return grad_x, grad_bias(ctx, grad_y)


def _setup_context_grad_x(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, *inputs[1:])


def _backward_grad_x(ctx: Any, grad_of_grad_x: Tensor) -> tuple[Tensor | None]:
    return (torch.ops.qlora_kernels.linear_nf4(grad_of_grad_x, *saved(ctx), None),)


differentiate(
    "qlora_kernels::linear_nf4",
    _backward,
    setup_context=_setup_context,
    wanted=itemgetter(0, BIAS),
    compose=spread(_composed, _FORWARD),
    constants=CONSTANTS,
)
differentiate(
    "qlora_kernels::linear_nf4_grad_x",
    _backward_grad_x,
    setup_context=_setup_context_grad_x,
    wanted=itemgetter(slice(0, 1)),
    compose=spread(_composed_grad_x, _GRAD_X),
    constants=CONSTANTS,
)


def _check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    check_x("linear_nf4", x, weight)
    check_bias("linear_nf4", bias, weight.N, x.device)


def _check_grad_x(grad_y: Tensor, weight: Weight) -> None:
    check_grad_y("linear_nf4_grad_x", grad_y, weight)
    check_weight("linear_nf4_grad_x", weight, grad_y.device)
