"""linear_nf4_lora: y = x W^T + bias + scaling * (dropout(x) A^T) B^T with W in NF4, and its three gradients.

Ops: qlora_kernels::linear_nf4_lora (differentiable in x, bias, lora_A, lora_B) and
qlora_kernels::linear_nf4_lora_backward.

Kernel contract: x [M, K] and grad_y [M, N] contiguous, M, N, K, r >= 1; lora_A [r, K] and lora_B [N, r] contiguous.
    linear_nf4_lora           run(x, packed, absmax, absmax_q, absmax_scale, absmax_offset, bias, lora_A, lora_B, seed,
                                  *, scaling, dropout_p, blocksize, out_features) -> (y [M, N], s [M, r]) of x.dtype
    linear_nf4_lora_backward  run(grad_y, x, s, packed, absmax, absmax_q, absmax_scale, absmax_offset, lora_A, lora_B,
                                  seed, *, scaling, dropout_p, blocksize, need_grad_x)
                              -> (grad_x [M, K] of x.dtype or empty, grad_A, grad_B in lora_A's and lora_B's dtype)

    s = dropout(x) A^T                      ds     = scaling * grad_y B
    y = x W^T + bias + scaling * s B^T      grad_B = scaling * grad_y^T s
                                            grad_A = ds^T dropout(x)
                                            grad_x = grad_y W + dropout'(ds A)

lora_A and lora_B are used in x's dtype, whatever dtype their master copies have; sums are kept in fp32. Between the
passes only x and s are saved: backward regenerates the dropout mask from the seed (ops/_philox.py) and decodes W again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from ._checks import check_bias, check_dropout, check_float, check_last_dim, check_lora, check_weight
from ._implement import differentiate, fake, implement
from ._registry import Problem, select
from .linear_nf4 import weight_shape

_CONSTANTS = "Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_offset"
torch.library.define(
    "qlora_kernels::linear_nf4_lora",
    f"(Tensor x, {_CONSTANTS}, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, *, "
    "float scaling, float dropout_p, int blocksize, SymInt out_features) -> (Tensor, Tensor)",
)
torch.library.define(
    "qlora_kernels::linear_nf4_lora_backward",
    f"(Tensor grad_y, Tensor x, Tensor s, {_CONSTANTS}, Tensor lora_A, Tensor lora_B, Tensor? seed, *, "
    "float scaling, float dropout_p, int blocksize, bool need_grad_x) -> (Tensor, Tensor, Tensor)",
)


def linear_nf4_lora(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling * (dropout(x) A^T) B^T in one op, forward and backward.

    x: [..., K], fp32, bf16 or fp16.   packed, state: from `quantize_nf4`, of a weight [N, K].
    lora_A: [r, K], lora_B: [N, r], any of the three dtypes, usually fp32 masters.   bias: [N] or None.
    scaling: lora_alpha / r.   dropout_p: in [0, 1).
    seed: int64, one element, on x's device; drawn from torch's generator where dropout_p > 0 and none is given.
    Returns y [..., N] of x.dtype. Differentiable in x, bias, lora_A and lora_B.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    Source: LoRA (arXiv:2106.09685) section 4.1 over QLoRA (arXiv:2305.14314) equation 5.
    """
    out_features, in_features = weight_shape("linear_nf4_lora", state)
    check_last_dim("linear_nf4_lora", "x", x, in_features, "K")
    if dropout_p > 0 and seed is None:
        seed = draw_seed(x.device)
    y: Tensor = torch.ops.qlora_kernels.linear_nf4_lora(
        x,
        packed,
        *state.constants,
        bias,
        lora_A,
        lora_B,
        seed if dropout_p > 0 else None,
        scaling=scaling,
        dropout_p=dropout_p,
        blocksize=state.blocksize,
        out_features=out_features,
    )[0]
    return y


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed, int64 [1], from `device`'s torch generator: reproducible under torch.manual_seed."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


@implement("qlora_kernels::linear_nf4_lora")
def linear_nf4_lora_impl(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """Checks, then the selected kernel over x as a matrix."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    _check("linear_nf4_lora", x, packed, constants, lora_A, lora_B, seed, dropout_p, blocksize, out_features)
    check_bias("linear_nf4_lora", bias, out_features, x.device)
    K, r = lora_A.shape[1], lora_A.shape[0]
    rows = x.reshape(-1, K) if K else x.new_empty(x.shape[:-1].numel(), 0)
    M = rows.shape[0]
    if M == 0 or out_features == 0 or K == 0:
        empty = x.new_zeros((*x.shape[:-1], out_features))
        return empty if bias is None else empty + bias.to(x.dtype), x.new_zeros((M, r))
    problem = Problem(
        "linear_nf4_lora",
        x.device.type,
        x.dtype,
        M,
        out_features,
        K,
        r,
        blocksize,
        double_quant=absmax_q is not None,
        dropout=dropout_p > 0,
    )
    y, s = select(problem).run(
        rows.contiguous(),
        packed,
        *constants,
        bias,
        lora_A.contiguous(),
        lora_B.contiguous(),
        seed,
        scaling=scaling,
        dropout_p=dropout_p,
        blocksize=blocksize,
        out_features=out_features,
    )
    return y.view(*x.shape[:-1], out_features), s


@fake("qlora_kernels::linear_nf4_lora")
def linear_nf4_lora_fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of y and s."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    _check("linear_nf4_lora", x, packed, constants, lora_A, lora_B, seed, dropout_p, blocksize, out_features)
    check_bias("linear_nf4_lora", bias, out_features, x.device)
    M = x.shape[:-1].numel()
    return x.new_empty((*x.shape[:-1], out_features)), x.new_empty((M, lora_A.shape[0]))


@implement("qlora_kernels::linear_nf4_lora_backward")
def linear_nf4_lora_backward_impl(
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
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    blocksize: int,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, then the selected kernel over x and grad_y as matrices."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    N, K, r = grad_y.shape[-1], x.shape[-1], lora_A.shape[0]
    _check("linear_nf4_lora_backward", x, packed, constants, lora_A, lora_B, seed, dropout_p, blocksize, N)
    M = x.shape[:-1].numel()
    if M == 0 or N == 0 or K == 0:
        grad_x = x.new_zeros(x.shape if need_grad_x else (0,))
        return grad_x, torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    problem = Problem(
        "linear_nf4_lora_backward",
        x.device.type,
        x.dtype,
        M,
        N,
        K,
        r,
        blocksize,
        double_quant=absmax_q is not None,
        dropout=dropout_p > 0,
    )
    grad_x, grad_A, grad_B = select(problem).run(
        grad_y.reshape(M, N).contiguous(),
        x.reshape(M, K).contiguous(),
        s,
        packed,
        *constants,
        lora_A.contiguous(),
        lora_B.contiguous(),
        seed,
        scaling=scaling,
        dropout_p=dropout_p,
        blocksize=blocksize,
        need_grad_x=need_grad_x,
    )
    return grad_x.view(x.shape) if need_grad_x else grad_x, grad_A, grad_B


@fake("qlora_kernels::linear_nf4_lora_backward")
def linear_nf4_lora_backward_fake(
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
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    blocksize: int,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the gradients."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    N = grad_y.shape[-1]
    _check("linear_nf4_lora_backward", x, packed, constants, lora_A, lora_B, seed, dropout_p, blocksize, N)
    grad_x = x.new_empty(x.shape if need_grad_x else (0,))
    return grad_x, torch.empty_like(lora_A), torch.empty_like(lora_B)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    x, packed, absmax, absmax_q, absmax_scale, absmax_offset, bias, lora_A, lora_B, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], packed, absmax, absmax_q, absmax_scale, absmax_offset, lora_A, lora_B, seed)
    ctx.scaling = keyword_only_inputs["scaling"]
    ctx.dropout_p = keyword_only_inputs["dropout_p"]
    ctx.blocksize = keyword_only_inputs["blocksize"]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
    need_grad_x, need_grad_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
    grad_x, grad_A, grad_B = torch.ops.qlora_kernels.linear_nf4_lora_backward(
        grad_y,
        *ctx.saved_tensors,
        scaling=ctx.scaling,
        dropout_p=ctx.dropout_p,
        blocksize=ctx.blocksize,
        need_grad_x=need_grad_x,
    )
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=ctx.bias_dtype) if need_grad_bias else None
    return grad_x if need_grad_x else None, None, None, None, None, None, grad_bias, grad_A, grad_B, None


differentiate("qlora_kernels::linear_nf4_lora", _backward, setup_context=_setup_context)


def _check(
    op: str,
    x: Tensor,
    packed: Tensor,
    constants: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> None:
    check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    in_features, numel = x.shape[-1], out_features * x.shape[-1]
    check_weight(op, packed, *constants, blocksize=blocksize, numel=numel, device=x.device)
    check_lora(op, lora_A, lora_B, in_features=in_features, out_features=out_features, device=x.device)
    check_dropout(op, dropout_p, seed)
