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
from .partials import fp32_safe_step, rank_tile, split_count, sum_partials
from .planner import capability_for

BLOCK_M, BLOCK_N = 32, 128
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


@launchable
@triton.jit
def multi_lora_ds_grad_B_kernel(
    p_grad_y,
    p_s,
    p_lora_B,
    p_adapter,
    p_scalings,
    p_ds,
    p_grad_B,
    M,
    N,
    R,
    DS: tl.constexpr,
    GRAD_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """ds_part[i_n, m, r] = scalings[e] * sum over this tile's n of grad_y[m, n] * B[e, n, r], for rows of adapter e;
    grad_B[e, n, r] = scalings[e] * sum over rows of adapter e of grad_y[m, n] * s[m, r].

    Grid (tiles of N, adapters + 1, tiles of R). A program loops over M and reads grad_y only for rows of its adapter.
    Program 0 of the second axis handles rows without an adapter and stores zeros for them.
    DS, GRAD_B: whether ds and grad_B are computed.
    """
    i_n, e, i_r = tl.program_id(0), tl.program_id(1) - 1, tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < N, o_r < R
    scale = tl.load(p_scalings + tl.maximum(e, 0))
    o_factor = (tl.maximum(e, 0).to(tl.int64) * N + o_n[:, None]) * R + o_r[None, :]
    m_factor = m_n[:, None] & m_r[None, :]
    if DS:
        b_B = tl.load(p_lora_B + o_factor, mask=m_factor, other=0.0).to(p_grad_y.dtype.element_ty)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for i in range(0, M, BLOCK_M):
        o_m = i + tl.arange(0, BLOCK_M)
        row_m = o_m.to(tl.int64)
        mine = (o_m < M) & (tl.load(p_adapter + o_m, mask=o_m < M, other=-2) == e)
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            used = mine & (e >= 0)
            b_grad = tl.load(p_grad_y + row_m[:, None] * N + o_n[None, :], mask=used[:, None] & m_n[None, :], other=0.0)
            if GRAD_B:
                b_s = tl.load(p_s + row_m[:, None] * R + o_r[None, :], mask=used[:, None] & m_r[None, :], other=0.0)
                acc = tl.dot(tl.trans(b_grad), b_s, acc, input_precision="ieee")
            if DS:
                b_ds = tl.dot(b_grad, b_B, input_precision="ieee") * scale
                o_ds = (i_n.to(tl.int64) * M + row_m[:, None]) * R + o_r[None, :]
                tl.store(p_ds + o_ds, b_ds, mask=mine[:, None] & m_r[None, :])
    if GRAD_B and e >= 0:
        tl.store(p_grad_B + o_factor, (acc * scale).to(p_grad_B.dtype.element_ty), mask=m_factor)


@launchable
@triton.jit
def multi_lora_grad_A_kernel(
    p_x,
    p_ds,
    p_adapter,
    p_seed,
    p_grad_A,
    M,
    K,
    R,
    keep_scale,
    threshold,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """grad_A[e, r, k] = keep_scale * sum over rows of adapter e of ds[m, r] * keep(m, k) * x[m, k].

    Grid (tiles of K, adapters, tiles of R); a program loops over M and reads x only for rows of its adapter.
    """
    i_k, e, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    if DROPOUT:
        seed = tl.load(p_seed)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for i in range(0, M, BLOCK_M):
        o_m = i + tl.arange(0, BLOCK_M)
        row_m = o_m.to(tl.int64)
        mine = (o_m < M) & (tl.load(p_adapter + o_m, mask=o_m < M, other=-1) == e)
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            b_x = tl.load(p_x + row_m[:, None] * K + o_k[None, :], mask=mine[:, None] & m_k[None, :], other=0.0)
            b_ds = tl.load(p_ds + row_m[:, None] * R + o_r[None, :], mask=mine[:, None] & m_r[None, :], other=0.0)
            if DROPOUT:
                keep = keep_tile(seed, threshold, i, i_k * BLOCK_K, K, DROPOUT, BLOCK_M, BLOCK_K)
                b_x = tl.where(keep, b_x, 0.0)
            acc = tl.dot(tl.trans(b_ds), b_x, acc, input_precision="ieee")
    o_grad_A = (e.to(tl.int64) * R + o_r[:, None]) * K + o_k[None, :]
    tl.store(p_grad_A + o_grad_A, (acc * keep_scale).to(p_grad_A.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


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
    ds, grad_B = _ds_grad_B(grad_y, s, lora, needs)
    grad_A = _grad_A(x, ds, lora, dropout) if needs.need_grad_A else lora.A.new_empty(0)
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


def _ds_grad_B(grad_y: Tensor, s: Tensor, lora: MultiLoRA, needs: Needs) -> tuple[Tensor, Tensor]:
    """Return (ds [M, r] of grad_y.dtype, grad_B), empty where not needed."""
    if not (needs.need_ds or needs.need_grad_B):
        return grad_y.new_empty(0), lora.B.new_empty(0)
    M, N = grad_y.shape
    adapters, r, _ = lora.A.shape
    dtype = grad_y.dtype
    block_r, block_m, block_n = rank_tile(r, dtype), fp32_safe_step(BLOCK_M, dtype), fp32_safe_step(BLOCK_N, dtype)
    tiles_n = cdiv(N, block_n)
    ds_parts = grad_y.new_empty((tiles_n, M, r) if needs.need_ds else 0, dtype=torch.float32)
    grad_B = torch.empty_like(lora.B) if needs.need_grad_B else lora.B.new_empty(0)
    multi_lora_ds_grad_B_kernel[(tiles_n, adapters + 1, cdiv(r, block_r))](
        grad_y,
        s,
        lora.B,
        lora.adapter,
        lora.scalings,
        ds_parts,
        grad_B,
        M,
        N,
        r,
        DS=needs.need_ds,
        GRAD_B=needs.need_grad_B,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return sum_partials(ds_parts, 1.0, dtype) if needs.need_ds else grad_y.new_empty(0), grad_B


def _grad_A(x: Tensor, ds: Tensor, lora: MultiLoRA, dropout: Dropout) -> Tensor:
    """Return grad_A [E, r, K] of lora_A.dtype."""
    adapters, r, K = lora.A.shape
    block_r = rank_tile(r, x.dtype)
    grad_A = torch.empty_like(lora.A)
    multi_lora_grad_A_kernel[(cdiv(K, 128), adapters, cdiv(r, block_r))](
        x,
        ds,
        lora.adapter,
        dropout.seed,
        grad_A,
        x.shape[0],
        K,
        r,
        float(dropout.rate.scale),
        dropout.rate.threshold,
        DROPOUT=dropout.rate.elements_per_philox_call(K),
        BLOCK_M=fp32_safe_step(BLOCK_M, x.dtype),
        BLOCK_K=128,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return grad_A
