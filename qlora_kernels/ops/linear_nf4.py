"""linear_nf4: y = x W^T + bias with W in NF4, and grad_x = grad_y W from the same bytes.

Ops: qlora_kernels::linear_nf4 (differentiable in x and bias) and qlora_kernels::linear_nf4_grad_x.

Kernel contract: x [M, K] and grad_y [M, N] contiguous, M, N, K >= 1; weight: Weight, bias [N] or None.
    linear_nf4         run(x, weight, bias) -> y [M, N] of x.dtype
    linear_nf4_grad_x  run(grad_y, weight)  -> grad_x [M, K] of grad_y.dtype
W is dequantized to x's dtype, or used unrounded in fp32; sums are fp32, and the result is rounded once. Each of the two
ops is the gradient of the other, so that derivatives of any order run on the kernels; forward mode and the transforms
of torch.func run on compose.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from . import compose
from ._implement import differentiate, fake, implement
from ._linear import (
    CONSTANTS,
    bias_only_output,
    flatten_to_2d,
    is_empty,
    problem_of,
    restore_leading_dims,
    sum_over_rows,
)
from .checks import check_bias, check_grad_y, check_weight, check_x
from .operands import Weight, weight_of
from .registry import select

_FORWARD = (Tensor, Weight, Tensor)
_GRAD_X = (Tensor, Weight)
torch.library.define("qlora_kernels::linear_nf4", f"(Tensor x, {Weight.schema()}, Tensor? bias) -> Tensor")
torch.library.define("qlora_kernels::linear_nf4_grad_x", f"(Tensor grad_y, {Weight.schema()}) -> Tensor")


def linear_nf4(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """Compute y = x @ W.T + bias, where W [N, K] = dequantize_nf4(packed, state, x.dtype) is never stored.

    x: [..., K], fp32, bf16 or fp16, any strides.   packed, state: from `quantize_nf4`, of a two-dimensional weight.
    bias: [N] or None.
    Returns y [..., N] of x.dtype. Differentiable in x and bias; W is a constant.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    """
    y: Tensor = torch.ops.qlora_kernels.linear_nf4.default(x, *weight_of("linear_nf4", packed, state), bias)
    return y


@implement("qlora_kernels::linear_nf4", _FORWARD)
def linear_nf4_impl(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Check the arguments, then run the selected kernel over x as a matrix."""
    _check_linear(x, weight, bias)
    if is_empty(x, weight):
        return bias_only_output(x, weight, bias)
    y: Tensor = select(problem_of("linear_nf4", x, weight)).run(flatten_to_2d(x), weight, bias)
    return restore_leading_dims(y, x)


@fake("qlora_kernels::linear_nf4", _FORWARD)
def linear_nf4_fake(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return an empty tensor with the shape and dtype of y."""
    _check_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.N))


@implement("qlora_kernels::linear_nf4_grad_x", _GRAD_X)
def linear_nf4_grad_x_impl(grad_y: Tensor, weight: Weight) -> Tensor:
    """Check the arguments, then run the selected kernel over grad_y as a matrix."""
    _check_grad_x(grad_y, weight)
    if is_empty(grad_y, weight):
        return grad_y.new_zeros((*grad_y.shape[:-1], weight.K))
    grad_x: Tensor = select(problem_of("linear_nf4_grad_x", grad_y, weight)).run(flatten_to_2d(grad_y), weight)
    return restore_leading_dims(grad_x, grad_y)


@fake("qlora_kernels::linear_nf4_grad_x", _GRAD_X)
def linear_nf4_grad_x_fake(grad_y: Tensor, weight: Weight) -> Tensor:
    """Return an empty tensor with the shape and dtype of grad_x."""
    _check_grad_x(grad_y, weight)
    return grad_y.new_empty((*grad_y.shape[:-1], weight.K))


class LinearNF4Function(torch.autograd.Function):
    """The y of linear_nf4 and its gradients with respect to x and the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, run: Callable[..., Any]) -> Tensor:
        """Return y, and save the weight's tensors for backward, which does not need x."""
        ctx.save_for_backward(weight.packed, *weight.constants)
        ctx.blocksize, ctx.N, ctx.K = weight.blocksize, weight.N, weight.K
        ctx.bias_dtype = None if bias is None else bias.dtype
        y: Tensor = run(x, *weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        """Return the gradients of (x, weight, bias, run)."""
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = Weight._make((*ctx.saved_tensors, ctx.blocksize, ctx.N, ctx.K))
            grad_x = torch.ops.qlora_kernels.linear_nf4_grad_x.default(grad_y, *weight)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_over_rows(grad_y, ctx.bias_dtype)
        return grad_x, None, grad_bias, None


class LinearNF4GradXFunction(torch.autograd.Function):
    """The grad_x = grad_y W of linear_nf4_grad_x and its gradient with respect to grad_y."""

    @staticmethod
    def forward(ctx: Any, grad_y: Tensor, weight: Weight, run: Callable[..., Any]) -> Tensor:
        """Return grad_x and save the weight for backward."""
        ctx.save_for_backward(weight.packed, *weight.constants)
        ctx.blocksize, ctx.N, ctx.K = weight.blocksize, weight.N, weight.K
        grad_x: Tensor = run(grad_y, *weight)
        return grad_x

    @staticmethod
    def backward(ctx: Any, grad_of_grad_x: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradients of (grad_y, weight, run); the product with W^T is the op linear_nf4."""
        weight = Weight._make((*ctx.saved_tensors, ctx.blocksize, ctx.N, ctx.K))
        return torch.ops.qlora_kernels.linear_nf4.default(grad_of_grad_x, *weight, None), None, None


def linear_nf4_composed(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Check the arguments, then compose linear_nf4 of torch's ops."""
    _check_linear(x, weight, bias)
    return compose.linear(x, weight, bias)


def linear_nf4_grad_x_composed(grad_y: Tensor, weight: Weight) -> Tensor:
    """Check the arguments, then compose linear_nf4_grad_x of torch's ops."""
    _check_grad_x(grad_y, weight)
    return compose.grad_x(grad_y, weight)


differentiate(
    "qlora_kernels::linear_nf4",
    _FORWARD,
    LinearNF4Function.apply,
    compose=linear_nf4_composed,
    constants=CONSTANTS,
)
differentiate(
    "qlora_kernels::linear_nf4_grad_x",
    _GRAD_X,
    LinearNF4GradXFunction.apply,
    compose=linear_nf4_grad_x_composed,
    constants=CONSTANTS,
)


def _check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    check_x("linear_nf4", x, weight)
    check_bias("linear_nf4", bias, weight.N, x.device)


def _check_grad_x(grad_y: Tensor, weight: Weight) -> None:
    check_grad_y("linear_nf4_grad_x", grad_y, weight)
    check_weight("linear_nf4_grad_x", weight, grad_y.device)
