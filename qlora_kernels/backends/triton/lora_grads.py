"""The adapters' gradients: ds and grad_B from one pass over grad_y, grad_A from one pass over x."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rounding import cdiv
from .dropout import Dropout, keep_tile
from .launch import KEPT_LAUNCHES, Launch, Launchable, launchable
from .partials import fp32_safe_step, partials_or_result, rank_tile, split_count, sum_partials
from .planner import capability_for

BLOCK_M = 64
NUM_WARPS, NUM_STAGES = 4, 2


@launchable
@triton.jit
def lora_ds_grad_B_kernel(
    p_grad_y,
    p_s,
    p_lora_B,
    p_ds,
    p_grad_B,
    p_copy,
    M,
    N,
    R,
    steps,
    stride_copy,
    ds_scale,
    grad_B_scale,
    COPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the two products that use grad_y, reading each tile of it once.

        ds_part[i_n, m, r]          = sum over this tile's n of grad_y[m, n] * B[n, r]
        grad_B_part[i_chunk, n, r]  = sum over this program's m of grad_y[m, n] * s[m, r]

    Grid (tiles of N, chunks of M, tiles of R). A program loops over `steps` tiles of M within one tile of N: the sum of
    grad_B stays in registers, and ds has one part per tile of N. The parts, fp32 [tiles_n, M, R] and [chunks, N, R],
    are added in order by a second launch, so that results are deterministic. A single part is the result, scaled.
    grad_y is read once per tile of R, which is once for r <= 64. COPY: the programs of the first tile of R also store
    it to copy [M, N], whose rows have a stride.
    """
    i_n, i_chunk, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < N, o_r < R
    b_B = tl.load(p_lora_B + o_n[:, None].to(tl.int64) * R + o_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0)
    b_B = b_B.to(p_grad_y.dtype.element_ty)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first = i_chunk * steps
    for i in range(first, min(first + steps, tl.cdiv(M, BLOCK_M))):
        o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        row_m = o_m.to(tl.int64)
        b_grad = tl.load(p_grad_y + row_m[:, None] * N + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        if COPY:
            p_tile = p_copy + row_m[:, None] * stride_copy + o_n[None, :]
            tl.store(p_tile, b_grad, mask=m_m[:, None] & m_n[None, :] & (i_r == 0))
        b_s = tl.load(p_s + row_m[:, None] * R + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_grad), b_s, acc, input_precision="ieee")
        b_ds = tl.dot(b_grad, b_B, input_precision="ieee")
        o_ds = (i_n.to(tl.int64) * M + row_m[:, None]) * R + o_r[None, :]
        tl.store(p_ds + o_ds, (b_ds * ds_scale).to(p_ds.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])
    o_grad_B = (i_chunk.to(tl.int64) * N + o_n[:, None]) * R + o_r[None, :]
    grad_B = (acc * grad_B_scale).to(p_grad_B.dtype.element_ty)
    tl.store(p_grad_B + o_grad_B, grad_B, mask=m_n[:, None] & m_r[None, :])


def lora_ds_grad_B(
    grad_y: Tensor, s: Tensor, lora_B: Tensor, scaling: float, copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (ds [M, r] = scaling * grad_y B of grad_y.dtype, grad_B [N, r] = scaling * grad_y^T s of lora_B.dtype).

    copy: receives grad_y where it is given; [M, N] with contiguous rows, which may have a stride.
    """
    M, N = grad_y.shape
    r = lora_B.shape[1]
    tiles_n, chunks, launch = _ds_grad_B_launch(
        lora_ds_grad_B_kernel,
        M,
        N,
        r,
        grad_y.dtype,
        capability_for(grad_y),
        None if copy is None else copy.stride(0),
        float(scaling),
    )
    ds = partials_or_result(grad_y, tiles_n, M, r, grad_y.dtype)
    grad_B = partials_or_result(grad_y, chunks, N, r, lora_B.dtype)
    launch(grad_y, s, lora_B, ds, grad_B, grad_y if copy is None else copy)
    if tiles_n > 1:
        ds = sum_partials(ds, scaling, grad_y.dtype)
    if chunks > 1:
        grad_B = sum_partials(grad_B, scaling, lora_B.dtype)
    return ds, grad_B


@lru_cache(maxsize=KEPT_LAUNCHES)
def _ds_grad_B_launch(
    kernel: Launchable,
    M: int,
    N: int,
    r: int,
    dtype: torch.dtype,
    capability: int,
    stride_copy: int | None,
    scaling: float,
) -> tuple[int, int, Launch]:
    """Return (tiles of N, chunks of M, the launch). stride_copy: None without a copy of grad_y."""
    block_r, block_m = rank_tile(r, dtype), fp32_safe_step(BLOCK_M, dtype)
    # A wider tile of N makes fewer parts of ds. At rank 64, four warps spilled 44 words on sm_80 even with the narrower
    # tile; eight warps do not.
    block_n = fp32_safe_step(256 if block_r <= 16 else 128, dtype)
    tiles_n, tiles_r = cdiv(N, block_n), cdiv(r, block_r)
    steps, chunks = split_count(cdiv(M, block_m), tiles_n * tiles_r, capability)
    launch = kernel.prepare(
        (tiles_n, chunks, tiles_r),
        (M, N, r, steps, stride_copy or 0, scaling if tiles_n == 1 else 1.0, scaling if chunks == 1 else 1.0),
        COPY=stride_copy is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS if block_r <= 32 else 2 * NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return tiles_n, chunks, launch


@launchable
@triton.jit
def lora_grad_A_kernel(
    p_x,
    p_ds,
    p_seed,
    p_grad_A,
    M,
    K,
    R,
    steps,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[i_chunk, r, k] = sum over this program's m of ds[m, r] * keep(m, k) * x[m, k], fp32 [chunks, R, K].

    Grid (tiles of K, chunks of M, tiles of R). The mask is computed again from the seed. Dropout's scale is applied
    when the parts are added, or here if there is one part.
    """
    i_k, i_chunk, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    if DROPOUT:
        seed = tl.load(p_seed)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    first = i_chunk * steps
    for i in range(first, min(first + steps, tl.cdiv(M, BLOCK_M))):
        o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        row_m = o_m.to(tl.int64)
        b_x = tl.load(p_x + row_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_ds = tl.load(p_ds + row_m[:, None] * R + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
        if DROPOUT:
            keep = keep_tile(seed, threshold, i * BLOCK_M, i_k * BLOCK_K, K, DROPOUT, BLOCK_M, BLOCK_K)
            b_x = tl.where(keep, b_x, 0.0)
        acc = tl.dot(tl.trans(b_ds), b_x, acc, input_precision="ieee")
    o_grad_A = (i_chunk.to(tl.int64) * R + o_r[:, None]) * K + o_k[None, :]
    grad_A = (acc * scale).to(p_grad_A.dtype.element_ty)
    tl.store(p_grad_A + o_grad_A, grad_A, mask=m_r[:, None] & m_k[None, :])


def lora_grad_A(x: Tensor, ds: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    """Return grad_A [r, K] = ds^T dropout(x) in `dtype`."""
    M, K = x.shape
    r = ds.shape[1]
    chunks, launch = _grad_A_launch(
        lora_grad_A_kernel,
        M,
        K,
        r,
        x.dtype,
        capability_for(x),
        dropout.elements_per_philox_call(K),
        dropout.threshold,
        dropout.scale,
    )
    grad_A = partials_or_result(x, chunks, r, K, dtype)
    launch(x, ds, dropout.seed, grad_A)
    return grad_A if chunks == 1 else sum_partials(grad_A, dropout.scale, dtype)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _grad_A_launch(
    kernel: Launchable,
    M: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    capability: int,
    dropout: int,
    threshold: int,
    scale: float,
) -> tuple[int, Launch]:
    """Return the number of chunks of M and the launch. dropout: DROPOUT."""
    block_r, block_m, block_k = rank_tile(r, dtype), fp32_safe_step(BLOCK_M, dtype), 128
    tiles_k, tiles_r = cdiv(K, block_k), cdiv(r, block_r)
    steps, chunks = split_count(cdiv(M, block_m), tiles_k * tiles_r, capability)
    launch = kernel.prepare(
        (tiles_k, chunks, tiles_r),
        (M, K, r, steps, threshold, scale if chunks == 1 else 1.0),
        DROPOUT=dropout,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return chunks, launch
