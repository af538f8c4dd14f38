"""rms_norm: y = normalized(x + residual) * weight, with the residual addition in the same pass.

Ops: qlora_kernels::rms_norm (differentiable in x, residual and weight) and qlora_kernels::rms_norm_backward.

With s = x + residual, rounded to x's dtype, and scale = 1 / sqrt(mean(s^2) + eps) over the last dimension in fp32:

    weight_offset = 0   y = weight * (s * scale rounded to x's dtype), in the dtype that the two factors promote to
    weight_offset = 1   y = (1 + weight) * s * scale in fp32, rounded once to x's dtype

These are the two forms in transformers' models: the first in Llama, Qwen and Mistral, the second in Gemma. The
gradients are those of the function without its roundings, and depend only on s and scale:

    g = grad_y * (weight_offset + weight),   n = s * scale
    grad_x = grad_residual = grad_s + scale * (g - n * mean(g * n)),   grad_weight = sum over rows of grad_y * n

Kernel contract: x, residual, s and the gradients are [M, C] and contiguous, weight [C] contiguous, M, C >= 1.
    rms_norm           run(x, residual or None, weight, eps, weight_offset) -> (y, s, or empty without residual,
                       scale fp32 [M])
    rms_norm_backward  run(grad_y, grad_s or None, s, weight, scale, weight_offset, *, need_grad_weight)
                       -> (grad_x of s.dtype, grad_weight of weight.dtype or empty)
Sums are kept in fp32.
Source: Root Mean Square Layer Normalization (arXiv:1910.07467) equation 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compose
from ._implement import compose_derivatives, differentiate, fake, implement
from ._linear import flatten_to_2d, restore_leading_dims
from .checks import check_float, check_like
from .registry import Problem, select
from .tensor_memory import contiguous

torch.library.define(
    "qlora_kernels::rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "qlora_kernels::rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor weight, Tensor scale, float eps, float weight_offset,"
    " bool need_grad_weight) -> (Tensor, Tensor)",
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Add a residual, normalize over the last dimension by the root mean square, and multiply by a weight.

    x: [..., C], fp32, bf16 or fp16.   weight: [C], any of the three dtypes.   eps: added to the mean square, >= 0.
    residual: of x's shape and dtype, or None.
    weight_offset: 0.0 multiplies by weight (Llama, Qwen, Mistral), 1.0 by 1 + weight (Gemma).
    Returns (y, x + residual); without a residual the second is x itself. y has x's shape and dtype, but the weight's
    dtype if weight_offset is 0.0 and the weight has higher precision. Differentiable in x, residual and weight.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    Source: transformers' LlamaRMSNorm and GemmaRMSNorm, whose roundings are reproduced.
    """
    y, s, _ = torch.ops.qlora_kernels.rms_norm.default(x, residual, weight, eps, weight_offset)
    return y, x if residual is None else s


@implement("qlora_kernels::rms_norm")
def rms_norm_impl(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, then run the selected kernel over x as a matrix."""
    _check(x, residual, weight, eps, weight_offset)
    if x.numel() == 0:
        return rms_norm_fake(x, residual, weight, eps, weight_offset)
    run = select(_problem("rms_norm", x)).run
    rows, added = flatten_to_2d(x), None if residual is None else flatten_to_2d(residual)
    y, s, scale = run(rows, added, contiguous("rms_norm", weight), eps, weight_offset)
    return restore_leading_dims(y, x), s if residual is None else restore_leading_dims(s, x), scale


@fake("qlora_kernels::rms_norm")
def rms_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of the results."""
    _check(x, residual, weight, eps, weight_offset)
    y = x.new_empty(x.shape, dtype=y_dtype(x, weight, weight_offset))
    s = x.new_empty((0,) if residual is None else x.shape)
    return y, s, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@implement("qlora_kernels::rms_norm_backward")
def rms_norm_backward_impl(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    weight_offset: float,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Check the arguments, then run the selected kernel over s as a matrix."""
    _check_backward(grad_y, grad_s, s, weight, scale, weight_offset)
    if s.numel() == 0:
        return torch.zeros_like(s), weight.new_zeros(weight.shape if need_grad_weight else (0,))
    run = select(_problem("rms_norm_backward", s)).run
    added = None if grad_s is None else flatten_to_2d(grad_s)
    grad_x, grad_weight = run(
        flatten_to_2d(grad_y),
        added,
        flatten_to_2d(s),
        contiguous("rms_norm", weight),
        scale,
        weight_offset,
        need_grad_weight=need_grad_weight,
    )
    return restore_leading_dims(grad_x, s), grad_weight


@fake("qlora_kernels::rms_norm_backward")
def rms_norm_backward_fake(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    weight_offset: float,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of the results."""
    _check_backward(grad_y, grad_s, s, weight, scale, weight_offset)
    return s.new_empty(s.shape), weight.new_empty(weight.shape if need_grad_weight else (0,))


def y_dtype(x: Tensor, weight: Tensor, weight_offset: float) -> torch.dtype:
    """Return the dtype of y, as defined in the docstring of this module."""
    return x.dtype if weight_offset else torch.promote_types(x.dtype, weight.dtype)


class RMSNormFunction(torch.autograd.Function):
    """The (y, s, scale) of rms_norm and the gradients with respect to x, residual and weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        weight_offset: float,
        run: Callable[..., Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (y, s, scale), and save s, weight and scale for backward."""
        y, s, scale = run(x, residual, weight, eps, weight_offset)
        ctx.has_residual, ctx.eps, ctx.weight_offset = residual is not None, eps, weight_offset
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([scale] if ctx.has_residual else [scale, s]))
        ctx.save_for_backward(s if ctx.has_residual else x, weight, scale)
        return y, s, scale

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_s: Tensor | None, grad_scale: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, residual, weight, eps, weight_offset, run)."""
        s, weight, scale = ctx.saved_tensors
        need_grad_weight = ctx.needs_input_grad[2]
        grad_x, grad_weight = grad_s, None
        if grad_y is not None:
            grad_x, grad_weight = torch.ops.qlora_kernels.rms_norm_backward.default(
                grad_y, grad_s, s, weight, scale, ctx.eps, ctx.weight_offset, need_grad_weight
            )
        grad_residual = grad_x if ctx.has_residual else None
        return grad_x, grad_residual, grad_weight if need_grad_weight else None, None, None, None


def rms_norm_composed(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, then compose rms_norm of torch's ops."""
    _check(x, residual, weight, eps, weight_offset)
    return compose.rms_norm(x, residual, weight, eps, weight_offset)


def rms_norm_backward_composed(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    weight_offset: float,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Check the arguments, then compose rms_norm_backward of torch's ops."""
    _check_backward(grad_y, grad_s, s, weight, scale, weight_offset)
    return compose.rms_norm_backward(grad_y, grad_s, s, weight, eps, weight_offset, need_grad_weight)


differentiate("qlora_kernels::rms_norm", (), RMSNormFunction.apply, compose=rms_norm_composed)
compose_derivatives("qlora_kernels::rms_norm_backward", (), rms_norm_backward_composed)


def _problem(op: str, x: Tensor) -> Problem:
    return Problem(op, x.device.type, x.dtype)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float) -> None:
    op = "rms_norm"
    check_float(op, "x", x)
    _check_weight(op, weight, x, weight_offset)
    if residual is not None:
        check_like(op, "residual", residual, "x", x)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be zero or positive, got {eps}")


def _check_weight(op: str, weight: Tensor, x: Tensor, weight_offset: float) -> None:
    check_float(op, "weight", weight)
    if x.dim() < 1 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        got = f"shape {tuple(weight.shape)} beside {tuple(x.shape)}"
        raise ValueError(f"{op}: weight must have one element for each of the last dimension of x, got {got}")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight must be on {x.device}, got {weight.device}")
    if weight_offset not in (0.0, 1.0):
        raise ValueError(f"{op}: weight_offset must be 0.0 or 1.0, got {weight_offset}")


def _check_backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor, weight_offset: float
) -> None:
    op = "rms_norm_backward"
    check_float(op, "s", s)
    _check_weight(op, weight, s, weight_offset)
    check_like(op, "grad_y", grad_y, "s", s, dtype=y_dtype(s, weight, weight_offset))
    if grad_s is not None:
        check_like(op, "grad_s", grad_s, "s", s)
    rows = s.shape[:-1].numel()
    if scale.shape != (rows,) or scale.dtype != torch.float32 or not scale.is_contiguous() or scale.device != s.device:
        got = f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
        raise ValueError(f"{op}: scale must be contiguous float32 [M={rows}] on {s.device}, got {got}")
