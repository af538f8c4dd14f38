"""The adapters' gradients: ds and grad_B from one pass over grad_y or two, grad_A from one pass over x.

One pass over grad_y writes a part of ds for each tile of N: fp32 [tiles of N, M, r], which a second launch reads. Two
passes read grad_y again instead. `passes_over_grad_y` chooses.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.operands import Needs
from ...rounding import cdiv
from .dropout import Dropout, DropoutRate, keep_tile
from .launch import KEPT_LAUNCHES, launchable
from .launch_sequence import LaunchSequence, Slot
from .lora_down import add_lora_down, splits_of_down
from .partials import add_sum, add_summed, fp32_safe_step, rank_tile, split_count
from .planner import LAUNCH_S, arch_for, capability_for

BLOCK_M = 64
NUM_WARPS, NUM_STAGES = 4, 2

PARTS_PER_SM = 2**20
"""Most bytes of partial sums of ds for each multiprocessor: 108 MiB on an A100, 132 on an H100."""


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
    DS: tl.constexpr,
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
    grad_y is read once per tile of R, which is once for r <= 64.
    DS: whether ds is computed.
    COPY: the programs of the first tile of R also store grad_y to copy [M, N], whose rows have a stride.
    """
    i_n, i_chunk, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < N, o_r < R
    if DS:
        p_B = p_lora_B + o_n[:, None].to(tl.int64) * R + o_r[None, :]
        b_B = tl.load(p_B, mask=m_n[:, None] & m_r[None, :], other=0.0).to(p_grad_y.dtype.element_ty)
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
        if DS:
            b_ds = tl.dot(b_grad, b_B, input_precision="ieee")
            o_ds = (i_n.to(tl.int64) * M + row_m[:, None]) * R + o_r[None, :]
            tl.store(p_ds + o_ds, (b_ds * ds_scale).to(p_ds.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])
    o_grad_B = (i_chunk.to(tl.int64) * N + o_n[:, None]) * R + o_r[None, :]
    grad_B = (acc * grad_B_scale).to(p_grad_B.dtype.element_ty)
    tl.store(p_grad_B + o_grad_B, grad_B, mask=m_n[:, None] & m_r[None, :])


def block_n_of(r: int, dtype: torch.dtype) -> int:
    """Return the columns of grad_y in a tile.

    A wider tile makes fewer parts of ds. At rank 64, four warps spilled 44 words on sm_80 even with the narrower tile;
    eight warps do not.
    """
    return fp32_safe_step(256 if rank_tile(r, dtype) <= 16 else 128, dtype)


def bytes_of_ds_parts(M: int, N: int, r: int, dtype: torch.dtype, capability: int) -> tuple[int, int]:
    """Return the bytes of the partial sums of ds with one pass over grad_y and with two, 0 for a single part."""
    parts = cdiv(N, block_n_of(r, dtype)), splits_of_down(M, N, r, dtype, capability)[1]
    one, two = (4 * count * M * r if count > 1 else 0 for count in parts)
    return one, two


def passes_over_grad_y(M: int, N: int, r: int, dtype: torch.dtype, capability: int) -> int:
    """Return 1, or 2 where the partial sums of one pass cost more than reading grad_y again or exceed PARTS_PER_SM.

    By the model: bytes over bandwidth, where partial sums are written and read, and a launch for the second pass.
    """
    arch = arch_for(capability)
    one, two = bytes_of_ds_parts(M, N, r, dtype, capability)
    if one > PARTS_PER_SM * arch.sm_count:
        return 2
    again = cdiv(r, rank_tile(r, dtype)) * M * N * dtype.itemsize
    return 2 if 2 * one > again + 2 * two + LAUNCH_S * arch.bytes_per_s else 1


def add_lora_ds_grad_B(
    sequence: LaunchSequence,
    grad_y: Slot,
    s: Slot,
    lora_B: Slot,
    copy: Slot | None,
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    capability: int,
    scaling: float,
    needs: Needs,
    stride_copy: int = 0,
) -> tuple[Slot | None, Slot | None]:
    """Add ds and grad_B to a sequence, as far as they are needed; return their slots.

    sizes: (M, N, r).   dtypes: of grad_y and lora_B.   copy: receives grad_y if ds is needed; None without a copy.
    """
    M, N, r = sizes
    dtype, dtype_B = dtypes
    block_r, block_m, block_n = rank_tile(r, dtype), fp32_safe_step(BLOCK_M, dtype), block_n_of(r, dtype)
    tiles_n, tiles_r = cdiv(N, block_n), cdiv(r, block_r)
    steps, chunks = split_count(cdiv(M, block_m), tiles_n * tiles_r, capability)
    together = needs.need_ds and needs.need_grad_B and passes_over_grad_y(M, N, r, dtype, capability) == 1
    ds: Slot | None = None
    if together:
        ds = sequence.allocate((M, r) if tiles_n == 1 else (tiles_n, M, r), dtype if tiles_n == 1 else torch.float32)
    elif needs.need_ds:
        copy_here = None if needs.need_grad_B else copy  # otherwise the pass for grad_B copies grad_y
        of_ds = (sizes, dtype, capability, DropoutRate(0, scaling))
        ds = add_lora_down(
            sequence, grad_y, lora_B, grad_y, copy_here, *of_ds, transposed=True, stride_copy=stride_copy
        )
    if not needs.need_grad_B:
        return ds, None
    launch = lora_ds_grad_B_kernel.prepare(
        (tiles_n, chunks, tiles_r),
        (M, N, r, steps, stride_copy, scaling if tiles_n == 1 else 1.0, scaling if chunks == 1 else 1.0),
        DS=together,
        COPY=copy is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS if block_r <= 32 else 2 * NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    grad_B = add_summed(
        sequence,
        launch,
        lambda out: (grad_y, s, lora_B, out if ds is None else ds, out, grad_y if copy is None else copy),
        chunks,
        (N, r),
        scaling,
        dtype_B,
    )
    if together and tiles_n > 1:
        assert ds is not None
        ds = add_sum(sequence, ds, tiles_n, (M, r), scaling, dtype)
    return ds, grad_B


def lora_ds_grad_B(
    grad_y: Tensor, s: Tensor, lora_B: Tensor, scaling: float, needs: Needs, copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (ds [M, r] = scaling * grad_y B of grad_y.dtype, grad_B [N, r] = scaling * grad_y^T s of lora_B.dtype),
    empty where not needed.

    s: not read if grad_B is not needed.   copy: receives grad_y where it is given and ds is needed; [M, N] with
    contiguous rows, which may have a stride.
    """
    if not (needs.need_ds or needs.need_grad_B):
        return grad_y.new_empty(0), lora_B.new_empty(0)
    M, N = grad_y.shape
    sequence = _ds_grad_B_sequence(
        (M, N, lora_B.shape[1]),
        (grad_y.dtype, lora_B.dtype),
        capability_for(grad_y),
        float(scaling),
        needs,
        None if copy is None else copy.stride(0),
    )
    results = iter(sequence(grad_y, s, lora_B, grad_y if copy is None else copy))
    ds = next(results) if needs.need_ds else grad_y.new_empty(0)
    return ds, next(results) if needs.need_grad_B else lora_B.new_empty(0)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _ds_grad_B_sequence(
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    capability: int,
    scaling: float,
    needs: Needs,
    stride_copy: int | None,
) -> LaunchSequence:
    """Return the launches of (grad_y, s, lora_B, copy), which return what is needed of ds and grad_B.

    stride_copy: None without a copy.
    """
    sequence = LaunchSequence(inputs=4)
    slots = (0, 1, 2, None if stride_copy is None else 3)
    both = add_lora_ds_grad_B(sequence, *slots, sizes, dtypes, capability, scaling, needs, stride_copy or 0)
    sequence.returns(*(slot for slot in both if slot is not None))
    return sequence


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


def add_lora_grad_A(
    sequence: LaunchSequence,
    x: Slot,
    ds: Slot,
    seed: Slot,
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    capability: int,
    rate: DropoutRate,
) -> Slot:
    """Add grad_A to a sequence; return its slot. sizes: (M, K, r).   dtypes: of x and lora_A."""
    M, K, r = sizes
    dtype, dtype_A = dtypes
    block_r, block_m, block_k = rank_tile(r, dtype), fp32_safe_step(BLOCK_M, dtype), 128
    tiles_k, tiles_r = cdiv(K, block_k), cdiv(r, block_r)
    steps, chunks = split_count(cdiv(M, block_m), tiles_k * tiles_r, capability)
    launch = lora_grad_A_kernel.prepare(
        (tiles_k, chunks, tiles_r),
        (M, K, r, steps, rate.threshold, rate.scale if chunks == 1 else 1.0),
        DROPOUT=rate.elements_per_philox_call(K),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return add_summed(sequence, launch, lambda out: (x, ds, seed, out), chunks, (r, K), rate.scale, dtype_A)


def lora_grad_A(x: Tensor, ds: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    """Return grad_A [r, K] = ds^T dropout(x) in `dtype`."""
    M, K = x.shape
    sequence = _grad_A_sequence((M, K, ds.shape[1]), (x.dtype, dtype), capability_for(x), dropout.rate)
    (grad_A,) = sequence(x, ds, dropout.seed)
    return grad_A


@lru_cache(maxsize=KEPT_LAUNCHES)
def _grad_A_sequence(
    sizes: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], capability: int, rate: DropoutRate
) -> LaunchSequence:
    """Return the launches of (x, ds, seed)."""
    sequence = LaunchSequence(inputs=3)
    sequence.returns(add_lora_grad_A(sequence, 0, 1, 2, sizes, dtypes, capability, rate))
    return sequence
