"""Gradients of the factors of linear_nf4_multi_lora: ds and grad_B from one pass over grad_y, grad_A from one of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.operands import MultiLoRA, Needs
from ...rounding import cdiv
from .dropout import Dropout, keep_tile
from .launch import launchable
from .partials import fp32_safe_step, rank_tile, sum_partials

BLOCK_M, BLOCK_N = 32, 128
NUM_WARPS, NUM_STAGES = 4, 2


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


def ds_grad_B(grad_y: Tensor, s: Tensor, lora: MultiLoRA, needs: Needs) -> tuple[Tensor, Tensor]:
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


def grad_A_of(x: Tensor, ds: Tensor, lora: MultiLoRA, dropout: Dropout) -> Tensor:
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
