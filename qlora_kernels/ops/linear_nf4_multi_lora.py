"""linear_nf4_multi_lora: a LoRA linear over NF4 in which each row of the batch names its own adapter.

    y[m] = W x[m] + bias + scalings[e] * B_e A_e dropout(x[m])      with e = adapter[m];   no low-rank part where e = -1

Ops: qlora_kernels::linear_nf4_multi_lora (differentiable in x, bias, lora_A, lora_B) and
qlora_kernels::linear_nf4_multi_lora_backward.

Kernel contract: x [M, K] and grad_y [M, N] contiguous, M, N, K, E, r >= 1; adapters contiguous.
    linear_nf4_multi_lora           run(x, packed, absmax, absmax_q, absmax_scale, absmax_offset, bias, lora_A, lora_B,
                                        scalings, adapter, seed, *, dropout_p, blocksize, out_features) -> (y, s [M, r])
    linear_nf4_multi_lora_backward  run(grad_y, x, s, packed, absmax, absmax_q, absmax_scale, absmax_offset, lora_A,
                                        lora_B, scalings, adapter, seed, *, dropout_p, blocksize, need_grad_x)
                                    -> (grad_x or empty, grad_A, grad_B)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..format.quant_state import Constants, QuantState
from ._checks import check_bias, check_dropout, check_float, check_last_dim, check_weight
from ._implement import fake, implement
from ._registry import Problem, select
from .linear_nf4 import weight_shape
from .linear_nf4_lora import draw_seed

_CONSTANTS = "Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_offset"
_ADAPTERS = "Tensor lora_A, Tensor lora_B, Tensor scalings, Tensor adapter, Tensor? seed"
torch.library.define(
    "qlora_kernels::linear_nf4_multi_lora",
    f"(Tensor x, {_CONSTANTS}, Tensor? bias, {_ADAPTERS}, *, float dropout_p, int blocksize, SymInt out_features)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "qlora_kernels::linear_nf4_multi_lora_backward",
    f"(Tensor grad_y, Tensor x, Tensor s, {_CONSTANTS}, {_ADAPTERS}, *, "
    "float dropout_p, int blocksize, bool need_grad_x) -> (Tensor, Tensor, Tensor)",
)


def linear_nf4_multi_lora(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y[m] = W x[m] + bias + scalings[e] * B_e A_e dropout(x[m]) with e = adapter[m], forward and backward.

    x: [..., K], fp32, bf16 or fp16.   packed, state: from `quantize_nf4`, of a weight [N, K].
    lora_A: [E, r, K], lora_B: [E, N, r]; adapters of smaller rank are padded with zeros.   scalings: fp32 [E].
    adapter: int64, one per row of x, 0..E-1, or -1 for the base alone.   bias: [N] or None.
    dropout_p, seed: as linear_nf4_lora.
    Returns y [..., N] of x.dtype. Differentiable in x, bias, lora_A and lora_B.
    Raises ValueError or TypeError, naming the argument.
    """
    out_features, in_features = weight_shape("linear_nf4_multi_lora", state)
    check_last_dim("linear_nf4_multi_lora", "x", x, in_features, "K")
    if dropout_p > 0 and seed is None:
        seed = draw_seed(x.device)
    y: Tensor = torch.ops.qlora_kernels.linear_nf4_multi_lora(
        x,
        packed,
        *state.constants,
        bias,
        lora_A,
        lora_B,
        scalings,
        adapter,
        seed if dropout_p > 0 else None,
        dropout_p=dropout_p,
        blocksize=state.blocksize,
        out_features=out_features,
    )[0]
    return y


@implement("qlora_kernels::linear_nf4_multi_lora")
def linear_nf4_multi_lora_impl(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    *,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """Checks, then the selected kernel over x as a matrix."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    op = "linear_nf4_multi_lora"
    _check(op, x, packed, constants, lora_A, lora_B, scalings, adapter, seed, dropout_p, blocksize, out_features)
    check_bias(op, bias, out_features, x.device)
    M, K, r = adapter.numel(), x.shape[-1], lora_A.shape[1]
    if M == 0 or out_features == 0 or K == 0:
        empty = x.new_zeros((*x.shape[:-1], out_features))
        return empty if bias is None else empty + bias.to(x.dtype), x.new_zeros((M, r))
    y, s = select(_problem(op, x, M, out_features, r, blocksize, absmax_q, dropout_p)).run(
        x.reshape(M, K).contiguous(),
        packed,
        *constants,
        bias,
        lora_A.contiguous(),
        lora_B.contiguous(),
        scalings.contiguous(),
        adapter.contiguous(),
        seed,
        dropout_p=dropout_p,
        blocksize=blocksize,
        out_features=out_features,
    )
    return y.view(*x.shape[:-1], out_features), s


@fake("qlora_kernels::linear_nf4_multi_lora")
def linear_nf4_multi_lora_fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    *,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of y and s."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    op = "linear_nf4_multi_lora"
    _check(op, x, packed, constants, lora_A, lora_B, scalings, adapter, seed, dropout_p, blocksize, out_features)
    check_bias(op, bias, out_features, x.device)
    return x.new_empty((*x.shape[:-1], out_features)), x.new_empty((x.shape[:-1].numel(), lora_A.shape[1]))


@implement("qlora_kernels::linear_nf4_multi_lora_backward")
def linear_nf4_multi_lora_backward_impl(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    *,
    dropout_p: float,
    blocksize: int,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, then the selected kernel over x and grad_y as matrices."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    op = "linear_nf4_multi_lora_backward"
    M, N, K, r = adapter.numel(), grad_y.shape[-1], x.shape[-1], lora_A.shape[1]
    _check(op, x, packed, constants, lora_A, lora_B, scalings, adapter, seed, dropout_p, blocksize, N)
    if M == 0 or N == 0 or K == 0:
        grad_x = x.new_zeros(x.shape if need_grad_x else (0,))
        return grad_x, torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    grad_x, grad_A, grad_B = select(_problem(op, x, M, N, r, blocksize, absmax_q, dropout_p)).run(
        grad_y.reshape(M, N).contiguous(),
        x.reshape(M, K).contiguous(),
        s,
        packed,
        *constants,
        lora_A.contiguous(),
        lora_B.contiguous(),
        scalings.contiguous(),
        adapter.contiguous(),
        seed,
        dropout_p=dropout_p,
        blocksize=blocksize,
        need_grad_x=need_grad_x,
    )
    return grad_x.view(x.shape) if need_grad_x else grad_x, grad_A, grad_B


@fake("qlora_kernels::linear_nf4_multi_lora_backward")
def linear_nf4_multi_lora_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    *,
    dropout_p: float,
    blocksize: int,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the gradients."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    op = "linear_nf4_multi_lora_backward"
    _check(op, x, packed, constants, lora_A, lora_B, scalings, adapter, seed, dropout_p, blocksize, grad_y.shape[-1])
    grad_x = x.new_empty(x.shape if need_grad_x else (0,))
    return grad_x, torch.empty_like(lora_A), torch.empty_like(lora_B)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    x, packed, absmax, absmax_q, absmax_scale, absmax_offset, bias, lora_A, lora_B, scalings, adapter, seed = inputs
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], packed, *constants, lora_A, lora_B, scalings, adapter, seed)
    ctx.dropout_p = keyword_only_inputs["dropout_p"]
    ctx.blocksize = keyword_only_inputs["blocksize"]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
    need_grad_x, need_grad_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
    grad_x, grad_A, grad_B = torch.ops.qlora_kernels.linear_nf4_multi_lora_backward(
        grad_y, *ctx.saved_tensors, dropout_p=ctx.dropout_p, blocksize=ctx.blocksize, need_grad_x=need_grad_x
    )
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=ctx.bias_dtype) if need_grad_bias else None
    weight = (None,) * 5
    return grad_x if need_grad_x else None, *weight, grad_bias, grad_A, grad_B, None, None, None


torch.library.register_autograd("qlora_kernels::linear_nf4_multi_lora", _backward, setup_context=_setup_context)


def _problem(
    op: str,
    x: Tensor,
    M: int,
    N: int,
    r: int,
    blocksize: int,
    absmax_q: Tensor | None,
    dropout_p: float,
) -> Problem:
    return Problem(
        op,
        x.device.type,
        x.dtype,
        M,
        N,
        x.shape[-1],
        r,
        blocksize,
        double_quant=absmax_q is not None,
        dropout=dropout_p > 0,
    )


def _check(
    op: str,
    x: Tensor,
    packed: Tensor,
    constants: Constants,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> None:
    check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    M, K = x.shape[:-1].numel(), x.shape[-1]
    check_weight(op, packed, *constants, blocksize=blocksize, numel=out_features * K, device=x.device)
    check_float(op, "lora_A", lora_A)
    check_float(op, "lora_B", lora_B)
    if lora_A.dim() != 3 or lora_A.shape[2] != K:
        raise ValueError(f"{op}: lora_A must have shape [E, r, K={K}], got {tuple(lora_A.shape)}")
    E, r, _ = lora_A.shape
    if lora_B.shape != (E, out_features, r):
        expected = f"[E={E}, N={out_features}, r={r}]"
        raise ValueError(f"{op}: lora_B must have shape {expected}, got {tuple(lora_B.shape)}")
    if scalings.shape != (E,) or scalings.dtype != torch.float32:
        raise ValueError(f"{op}: scalings must be float32 [E={E}], got {scalings.dtype} {tuple(scalings.shape)}")
    if adapter.shape != (M,) or adapter.dtype != torch.int64:
        raise ValueError(f"{op}: adapter must be int64 [M={M}], got {adapter.dtype} {tuple(adapter.shape)}")
    check_dropout(op, dropout_p, seed)
