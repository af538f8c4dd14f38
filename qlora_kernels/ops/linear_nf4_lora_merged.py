"""linear_nf4_lora_merged: y = x W'^T + bias with W' = W + scaling * B A computed while W is decoded.

    W'     = round(code * absmax + scaling * B A)   one rounding to x's dtype; sums and the update are fp32
    y      = x W'^T + bias                          grad_x = grad_y W'
    s      = x A^T,  ds = scaling * grad_y B        grad_A = ds^T x,  grad_B = scaling * grad_y^T s

Forward and grad_x are one product each, without a pass over x, y, grad_y or grad_x for the low-rank term. The gradients
of lora_A and lora_B are those of linear_nf4_lora. There is no dropout, which would make the update of each row of x
another one. docs/format.md has the error analysis.

Ops: qlora_kernels::linear_nf4_lora_merged (differentiable in x, bias, lora_A and lora_B) and
qlora_kernels::linear_nf4_lora_merged_backward.

Kernel contract: x [M, K] and grad_y [M, N] contiguous, M, N, K, r >= 1; lora: LoRA without dropout, factors contiguous.
    linear_nf4_lora_merged           run(x, weight, bias, lora) -> y [M, N] of x.dtype
    linear_nf4_lora_merged_backward  run(grad_y, x, weight, lora, needs)
                                     -> (grad_x [M, K] of x.dtype, grad_A, grad_B), empty where not needed
A kernel that never stores the decoded weight may keep the update apart and unrounded, as linear_nf4_lora does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compose
from ._implement import compose_derivatives, differentiate, fake, implement
from ._linear import (
    CONSTANTS,
    bias_only_output,
    flatten_to_2d,
    is_empty,
    problem_of,
    restore_leading_dims,
    sum_over_rows,
)
from .checks import check_bias, check_grad_y, check_lora, check_x
from .operands import LoRA, Needs, Weight
from .registry import select
from .tensor_memory import contiguous

_OP, _BACKWARD_OP = "linear_nf4_lora_merged", "linear_nf4_lora_merged_backward"
_FORWARD = (Tensor, Weight, Tensor, LoRA)
_BACKWARD = (Tensor, Tensor, Weight, LoRA, Needs)
Gradients = tuple[Tensor, Tensor, Tensor]
torch.library.define(f"qlora_kernels::{_OP}", f"(Tensor x, {Weight.schema()}, Tensor? bias, {LoRA.schema()}) -> Tensor")
torch.library.define(
    f"qlora_kernels::{_BACKWARD_OP}",
    f"(Tensor grad_y, Tensor x, {Weight.schema()}, {LoRA.schema()}, {Needs.schema()}) -> (Tensor, Tensor, Tensor)",
)


@implement(f"qlora_kernels::{_OP}", _FORWARD)
def linear_nf4_lora_merged_impl(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> Tensor:
    """Check the arguments, then run the selected kernel over x as a matrix."""
    _check_forward(x, weight, bias, lora)
    if is_empty(x, weight):
        return bias_only_output(x, weight, bias)
    y: Tensor = select(problem_of(_OP, x, weight, lora)).run(flatten_to_2d(x), weight, bias, _contiguous(lora))
    return restore_leading_dims(y, x)


@fake(f"qlora_kernels::{_OP}", _FORWARD)
def linear_nf4_lora_merged_fake(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> Tensor:
    """Return an empty tensor with the shape and dtype of y."""
    _check_forward(x, weight, bias, lora)
    return x.new_empty((*x.shape[:-1], weight.N))


def linear_nf4_lora_merged_composed(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> Tensor:
    """Check the arguments, then compose y of torch's ops, with the update apart."""
    _check_forward(x, weight, bias, lora)
    return compose.lora_linear(x, weight, bias, lora)[0]


@implement(f"qlora_kernels::{_BACKWARD_OP}", _BACKWARD)
def linear_nf4_lora_merged_backward_impl(
    grad_y: Tensor, x: Tensor, weight: Weight, lora: LoRA, needs: Needs
) -> Gradients:
    """Check the arguments, then run the selected kernel over grad_y and x as matrices."""
    _check_backward(grad_y, x, weight, lora)
    if is_empty(x, weight):
        return needs.only(torch.zeros_like(x), torch.zeros_like(lora.A), torch.zeros_like(lora.B))
    run = select(problem_of(_BACKWARD_OP, x, weight, lora)).run
    grad_x, grad_A, grad_B = run(flatten_to_2d(grad_y), flatten_to_2d(x), weight, _contiguous(lora), needs)
    return restore_leading_dims(grad_x, x) if needs.need_grad_x else grad_x, grad_A, grad_B


@fake(f"qlora_kernels::{_BACKWARD_OP}", _BACKWARD)
def linear_nf4_lora_merged_backward_fake(
    grad_y: Tensor, x: Tensor, weight: Weight, lora: LoRA, needs: Needs
) -> Gradients:
    """Return empty tensors with the shapes and dtypes of the gradients."""
    _check_backward(grad_y, x, weight, lora)
    return needs.only(x.new_empty(x.shape), torch.empty_like(lora.A), torch.empty_like(lora.B))


def linear_nf4_lora_merged_backward_composed(
    grad_y: Tensor, x: Tensor, weight: Weight, lora: LoRA, needs: Needs
) -> Gradients:
    """Check the arguments, then compose the gradients of torch's ops, with the update apart."""
    _check_backward(grad_y, x, weight, lora)
    return compose.lora_backward(grad_y, x, None, weight, lora, needs)


class LinearNF4LoRAMergedFunction(torch.autograd.Function):
    """The y of linear_nf4_lora_merged and its gradients with respect to x, the bias, lora_A and lora_B.

    Autograd inspects the arguments but not the fields of a bundle, so lora_A and lora_B are also passed separately.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        weight: Weight,
        lora: LoRA,
        run: Callable[..., Any],
    ) -> Tensor:
        """Return y and save the factors for backward, and x where the gradient of one of them is needed."""
        reads_x = any(ctx.needs_input_grad[2:4])
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if reads_x else None, lora_A, lora_B, weight.packed, *weight.constants)
        ctx.blocksize, ctx.N, ctx.K, ctx.scaling = weight.blocksize, weight.N, weight.K, lora.scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        y: Tensor = run(x, *weight, bias, *lora)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, bias, lora_A, lora_B, weight, lora, run)."""
        x, lora_A, lora_B, *of_weight = ctx.saved_tensors
        weight = Weight._make((*of_weight, ctx.blocksize, ctx.N, ctx.K))
        lora = LoRA(lora_A, lora_B, None, ctx.scaling, 0.0)
        need_grad_x, need_grad_bias, need_grad_A, need_grad_B, *_ = ctx.needs_input_grad
        x = grad_y.new_empty(ctx.x_shape) if x is None else x  # not read
        grad_x, grad_A, grad_B = torch.ops.qlora_kernels.linear_nf4_lora_merged_backward.default(
            grad_y, x, *weight, *lora, need_grad_x, need_grad_A, need_grad_B
        )
        grad_bias = sum_over_rows(grad_y, ctx.bias_dtype) if need_grad_bias else None
        grad_x = grad_x if need_grad_x else None
        grad_A, grad_B = grad_A if need_grad_A else None, grad_B if need_grad_B else None
        return grad_x, grad_bias, grad_A, grad_B, None, None, None


def _apply(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA, run: Callable[..., Any]) -> Tensor:
    y: Tensor = LinearNF4LoRAMergedFunction.apply(x, bias, lora.A, lora.B, weight, lora, run)  # type: ignore[no-untyped-call]
    return y


differentiate(f"qlora_kernels::{_OP}", _FORWARD, _apply, compose=linear_nf4_lora_merged_composed, constants=CONSTANTS)
compose_derivatives(f"qlora_kernels::{_BACKWARD_OP}", _BACKWARD, linear_nf4_lora_merged_backward_composed)


def _check_forward(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> None:
    check_x(_OP, x, weight)
    check_bias(_OP, bias, weight.N, x.device)
    _check_adapter(_OP, x, weight, lora)


def _check_backward(grad_y: Tensor, x: Tensor, weight: Weight, lora: LoRA) -> None:
    check_x(_BACKWARD_OP, x, weight)
    check_grad_y(_BACKWARD_OP, grad_y, weight, x)
    _check_adapter(_BACKWARD_OP, x, weight, lora)


def _check_adapter(op: str, x: Tensor, weight: Weight, lora: LoRA) -> None:
    check_lora(op, x, weight, lora)
    if lora.dropout_p > 0:
        raise ValueError(
            f"{op}: dropout_p must be 0, got {lora.dropout_p}: a weight cannot hold an update that differs from row to "
            "row of x; use linear_nf4_lora"
        )


def _contiguous(lora: LoRA) -> LoRA:
    return lora._replace(A=contiguous("lora_A", lora.A), B=contiguous("lora_B", lora.B))
