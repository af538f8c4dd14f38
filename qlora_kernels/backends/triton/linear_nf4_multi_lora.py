"""linear_nf4_multi_lora: rows of one batch with different adapters; each stage is one launch for all adapters.

The base matmul is linear_nf4.py's. Each low-rank kernel is its single-adapter counterpart with a loop, or a grid axis,
over adapters: a tile of rows is multiplied by an adapter's factors only if one of its rows uses it, with the other rows
masked to zero. Nothing is sorted or gathered and the host reads nothing, so that graphs can be captured. The work is
proportional to the number of (tile, adapter) pairs, which is least if the rows of an adapter are contiguous, as those
of a sequence are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.operands import MultiLoRA, Needs, Weight
from ...rounding import cdiv
from .dropout import Dropout, dropout_of, keep_tile
from .launch import launchable
from .linear_nf4 import backward, forward
from .lora_down import block_k_of
from .multi_lora_grads import ds_grad_B, grad_A_of
from .partials import rank_tile, split_count, sum_partials
from .planner import capability_for

BLOCK_M = 32
NUM_WARPS, NUM_STAGES = 4, 2


@launchable
@triton.jit
def multi_lora_down_kernel(
    p_x,
    p_lora_A,
    p_adapter,
    p_seed,
    p_s,
    M,
    K,
    R,
    E,
    steps,
    threshold,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[i_split, m, r] = sum over `steps` tiles of K of keep(m, k) * x[m, k] * A[adapter[m], r, k]; 0 for -1.

    Grid (tiles of M, splits of K, tiles of R); parts fp32 [splits, M, R], added in order by a second launch.
    """
    i_m, i_split, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m = o_m < M
    row_m = o_m.to(tl.int64)
    b_adapter = tl.load(p_adapter + o_m, mask=m_m, other=-1)
    b_adapter = tl.where(b_adapter < E, b_adapter, -1)  # numbers >= E would give invalid addresses
    if DROPOUT:
        seed = tl.load(p_seed)
    first = i_split * steps
    last = min(first + steps, tl.cdiv(K, BLOCK_K))
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    e_last = tl.max(b_adapter, axis=0)
    e = tl.min(tl.where(b_adapter < 0, e_last, b_adapter), axis=0)
    while (e >= 0) & (e <= e_last):
        mine = b_adapter == e
        for i in range(first, last):
            column = i * BLOCK_K + tl.arange(0, BLOCK_K)
            b_x = tl.load(
                p_x + row_m[:, None] * K + column[None, :], mask=mine[:, None] & (column[None, :] < K), other=0.0
            )
            p_tile = p_lora_A + (e * R + o_r[None, :]) * K + column[:, None]
            b_A = tl.load(p_tile, mask=(o_r[None, :] < R) & (column[:, None] < K), other=0.0)
            if DROPOUT:
                keep = keep_tile(seed, threshold, i_m * BLOCK_M, i * BLOCK_K, K, DROPOUT, BLOCK_M, BLOCK_K)
                b_x = tl.where(keep, b_x, 0.0)
            acc = tl.dot(b_x, b_A.to(b_x.dtype), acc, input_precision="ieee")
        # The next adapter that a row of this tile uses; after the last one, the loop ends.
        e = tl.min(tl.where(b_adapter > e, b_adapter, e_last + 1), axis=0)
    o_s = (i_split.to(tl.int64) * M + row_m[:, None]) * R + o_r[None, :]
    tl.store(p_s + o_s, acc, mask=m_m[:, None] & (o_r[None, :] < R))


@launchable
@triton.jit
def multi_lora_up_kernel(
    p_left,
    p_right,
    p_adapter,
    p_scalings,
    p_bias,
    p_seed,
    p_out,
    M,
    C,
    R,
    E,
    stride_right_e,
    stride_right_r,
    stride_right_c,
    factor,
    threshold,
    HAS_SCALINGS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[m, c] += factor * scalings[e] * keep(m, c) * sum_r left[m, r] * right[e, r, c] + bias[c], e = adapter[m].

    One tile [BLOCK_M, BLOCK_C] per program, read before it is written; fp32 sum, rounded once.
    forward: left = s, right = B^T.   backward: left = ds, which includes the scalings, right = A.
    """
    i_m, i_c = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < M, o_c < C
    row_m = o_m.to(tl.int64)
    b_adapter = tl.load(p_adapter + o_m, mask=m_m, other=-1)
    b_adapter = tl.where(b_adapter < E, b_adapter, -1)  # numbers >= E would give invalid addresses
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    e_last = tl.max(b_adapter, axis=0)
    e = tl.min(tl.where(b_adapter < 0, e_last, b_adapter), axis=0)
    while (e >= 0) & (e <= e_last):
        mine = b_adapter == e
        scale = factor
        if HAS_SCALINGS:
            scale = factor * tl.load(p_scalings + e)
        for i_r in range(0, R, BLOCK_R):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_r = o_r < R
            b_left = tl.load(p_left + row_m[:, None] * R + o_r[None, :], mask=mine[:, None] & m_r[None, :], other=0.0)
            o_right = o_r[:, None].to(tl.int64) * stride_right_r + o_c[None, :].to(tl.int64) * stride_right_c
            p_tile = p_right + e * stride_right_e + o_right
            b_right = tl.load(p_tile, mask=m_r[:, None] & m_c[None, :], other=0.0)
            acc += scale * tl.dot(b_left, b_right.to(b_left.dtype), input_precision="ieee")
        e = tl.min(tl.where(b_adapter > e, b_adapter, e_last + 1), axis=0)
    if DROPOUT:
        keep = keep_tile(tl.load(p_seed), threshold, i_m * BLOCK_M, i_c * BLOCK_C, C, DROPOUT, BLOCK_M, BLOCK_C)
        acc = tl.where(keep, acc, 0.0)
    o_out = row_m[:, None] * C + o_c[None, :]
    m_out = m_m[:, None] & m_c[None, :]
    acc += tl.load(p_out + o_out, mask=m_out, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m_out)


def multi_lora_up(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    adapter: Tensor,
    *,
    right_is_transposed: bool,
    scalings: Tensor | None,
    bias: Tensor | None,
    factor: float,
    dropout: Dropout,
) -> None:
    """Add the rows' low-rank terms to out [M, C]. right: lora_B [E, C, r] if right_is_transposed, else lora_A [E, r,
    C].
    """
    M, C = out.shape
    r = left.shape[1]
    block_c = 64 if out.dtype == torch.float32 else 128
    multi_lora_up_kernel[(cdiv(M, BLOCK_M), cdiv(C, block_c))](
        left,
        right,
        adapter,
        left if scalings is None else scalings,
        left if bias is None else bias,
        dropout.seed,
        out,
        M,
        C,
        r,
        right.shape[0],
        C * r,
        1 if right_is_transposed else C,
        r if right_is_transposed else 1,
        float(factor),
        dropout.rate.threshold,
        HAS_SCALINGS=scalings is not None,
        HAS_BIAS=bias is not None,
        DROPOUT=dropout.rate.elements_per_philox_call(C),
        BLOCK_M=BLOCK_M,
        BLOCK_C=block_c,
        BLOCK_R=rank_tile(r, out.dtype),
        num_warps=NUM_WARPS,
    )


def linear_nf4_multi_lora(x: Tensor, weight: Weight, bias: Tensor | None, lora: MultiLoRA) -> tuple[Tensor, Tensor]:
    """Return (y, s). See ops/linear_nf4_multi_lora.py for the contract."""
    M, K = x.shape
    r = lora.r
    dropout = dropout_of(lora.seed, lora.dropout_p, x)
    block_r, block_k = rank_tile(r, x.dtype), block_k_of(x.dtype)
    tiles_m, tiles_r = cdiv(M, BLOCK_M), cdiv(r, block_r)
    steps, splits = split_count(cdiv(K, block_k), tiles_m * tiles_r, capability_for(x))
    parts = torch.empty((splits, M, r), dtype=torch.float32, device=x.device)
    multi_lora_down_kernel[(tiles_m, splits, tiles_r)](
        x,
        lora.A,
        lora.adapter,
        dropout.seed,
        parts,
        M,
        K,
        r,
        lora.A.shape[0],
        steps,
        dropout.rate.threshold,
        DROPOUT=dropout.rate.elements_per_philox_call(K),
        BLOCK_M=BLOCK_M,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    s = sum_partials(parts, dropout.rate.scale, x.dtype)
    y = forward(x, weight, None, None)
    multi_lora_up(
        y,
        s,
        lora.B,
        lora.adapter,
        right_is_transposed=True,
        scalings=lora.scalings,
        bias=bias,
        factor=1.0,
        dropout=dropout_of(None, 0.0, x),
    )
    return y, s


def linear_nf4_multi_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Weight,
    lora: MultiLoRA,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x, grad_A, grad_B), empty where not needed. See ops/linear_nf4_multi_lora.py for the contract."""
    dropout = dropout_of(lora.seed, lora.dropout_p, x)
    ds, grad_B = ds_grad_B(grad_y, s, lora, needs)
    grad_A = grad_A_of(x, ds, lora, dropout) if needs.need_grad_A else lora.A.new_empty(0)
    grad_x = x.new_empty(0)
    if needs.need_grad_x:
        grad_x = backward(grad_y, weight, None, dropout)
        multi_lora_up(
            grad_x,
            ds,
            lora.A,
            lora.adapter,
            right_is_transposed=False,
            scalings=None,
            bias=None,
            factor=dropout.rate.scale,
            dropout=dropout,
        )
    return grad_x, grad_A, grad_B
