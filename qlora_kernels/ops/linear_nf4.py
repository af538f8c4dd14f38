"""linear_nf4: y = x W^T + bias with W in NF4, and grad_x = grad_y W from the same bytes.

Ops: qlora_kernels::linear_nf4 (differentiable in x and bias) and qlora_kernels::linear_nf4_grad_x.

Kernel contract: x [M, K] and grad_y [M, N] contiguous, M, N, K >= 1; W is [N, K] row-major.
    linear_nf4         run(x, packed, absmax, absmax_q, absmax_scale, absmax_offset, bias, *, blocksize, out_features)
                       -> y [M, N] of x.dtype
    linear_nf4_grad_x  run(grad_y, packed, absmax, absmax_q, absmax_scale, absmax_offset, *, blocksize, in_features)
                       -> grad_x [M, K] of grad_y.dtype
W is used as dequantized to x's dtype, sums are kept in fp32, and the result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from ._checks import check_bias, check_float, check_last_dim, check_weight
from ._implement import differentiate, fake, implement
from ._registry import Problem, select

_CONSTANTS = "Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_offset"
torch.library.define(
    "qlora_kernels::linear_nf4",
    f"(Tensor x, {_CONSTANTS}, Tensor? bias, *, int blocksize, SymInt out_features) -> Tensor",
)
torch.library.define(
    "qlora_kernels::linear_nf4_grad_x",
    f"(Tensor grad_y, {_CONSTANTS}, *, int blocksize, SymInt in_features) -> Tensor",
)


def linear_nf4(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """y = x @ W.T + bias, where W [N, K] = dequantize_nf4(packed, state, x.dtype) is never stored.

    x: [..., K], fp32, bf16 or fp16, any strides.   packed, state: from `quantize_nf4`, of a two-dimensional weight.
    bias: [N] or None.
    Returns y [..., N] of x.dtype. Differentiable in x and bias; W is a constant.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    """
    out_features, in_features = weight_shape("linear_nf4", state)
    check_last_dim("linear_nf4", "x", x, in_features, "K")
    y: Tensor = torch.ops.qlora_kernels.linear_nf4(
        x, packed, *state.constants, bias, blocksize=state.blocksize, out_features=out_features
    )
    return y


def weight_shape(op: str, state: QuantState) -> tuple[int, int]:
    """(N, K) of the weight that `state` describes."""
    if len(state.shape) != 2:
        raise ValueError(f"{op}: state must describe a two-dimensional weight, got shape {tuple(state.shape)}")
    return state.shape[0], state.shape[1]


@implement("qlora_kernels::linear_nf4")
def linear_nf4_impl(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    *,
    blocksize: int,
    out_features: int,
) -> Tensor:
    """Checks, then the selected kernel over x as a matrix."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    _check_linear(x, packed, *constants, bias, blocksize=blocksize, out_features=out_features)
    K = x.shape[-1]
    rows = x.reshape(-1, K) if K else x.new_empty(x.shape[:-1].numel(), 0)
    M = rows.shape[0]
    shape = (*x.shape[:-1], out_features)
    if M == 0 or out_features == 0 or K == 0:
        empty = x.new_zeros(shape)
        return empty if bias is None else empty + bias.to(x.dtype)
    problem = Problem(
        "linear_nf4", x.device.type, x.dtype, M, out_features, K, blocksize=blocksize, double_quant=absmax_q is not None
    )
    y: Tensor = select(problem).run(
        rows.contiguous(), packed, *constants, bias, blocksize=blocksize, out_features=out_features
    )
    return y.view(shape)


@fake("qlora_kernels::linear_nf4")
def linear_nf4_fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    *,
    blocksize: int,
    out_features: int,
) -> Tensor:
    """Shape and dtype of y."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    _check_linear(x, packed, *constants, bias, blocksize=blocksize, out_features=out_features)
    return x.new_empty((*x.shape[:-1], out_features))


@implement("qlora_kernels::linear_nf4_grad_x")
def linear_nf4_grad_x_impl(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """Checks, then the selected kernel over grad_y as a matrix."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    _check_grad_x(grad_y, packed, *constants, blocksize=blocksize, in_features=in_features)
    N = grad_y.shape[-1]
    rows = grad_y.reshape(-1, N) if N else grad_y.new_empty(grad_y.shape[:-1].numel(), 0)
    M = rows.shape[0]
    shape = (*grad_y.shape[:-1], in_features)
    if M == 0 or N == 0 or in_features == 0:
        return grad_y.new_zeros(shape)
    problem = Problem(
        "linear_nf4_grad_x",
        grad_y.device.type,
        grad_y.dtype,
        M,
        N,
        in_features,
        blocksize=blocksize,
        double_quant=absmax_q is not None,
    )
    grad_x: Tensor = select(problem).run(
        rows.contiguous(), packed, *constants, blocksize=blocksize, in_features=in_features
    )
    return grad_x.view(shape)


@fake("qlora_kernels::linear_nf4_grad_x")
def linear_nf4_grad_x_fake(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """Shape and dtype of grad_x."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    _check_grad_x(grad_y, packed, *constants, blocksize=blocksize, in_features=in_features)
    return grad_y.new_empty((*grad_y.shape[:-1], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, packed, absmax, absmax_q, absmax_scale, absmax_offset, bias = inputs
    ctx.save_for_backward(packed, absmax, absmax_q, absmax_scale, absmax_offset)
    ctx.blocksize = keyword_only_inputs["blocksize"]
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_kernels.linear_nf4_grad_x(
            grad_y, *ctx.saved_tensors, blocksize=ctx.blocksize, in_features=ctx.in_features
        )
    if ctx.needs_input_grad[6]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias


differentiate("qlora_kernels::linear_nf4", _backward, setup_context=_setup_context)


def _check_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    *,
    blocksize: int,
    out_features: int,
) -> None:
    check_float("linear_nf4", "x", x)
    if x.dim() < 1:
        raise ValueError("linear_nf4: x must have at least one dimension, got a scalar")
    check_weight(
        "linear_nf4",
        packed,
        absmax,
        absmax_q,
        absmax_scale,
        absmax_offset,
        blocksize=blocksize,
        numel=out_features * x.shape[-1],
        device=x.device,
    )
    check_bias("linear_nf4", bias, out_features, x.device)


def _check_grad_x(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    in_features: int,
) -> None:
    check_float("linear_nf4_grad_x", "grad_y", grad_y)
    check_weight(
        "linear_nf4_grad_x",
        packed,
        absmax,
        absmax_q,
        absmax_scale,
        absmax_offset,
        blocksize=blocksize,
        numel=in_features * grad_y.shape[-1],
        device=grad_y.device,
    )
