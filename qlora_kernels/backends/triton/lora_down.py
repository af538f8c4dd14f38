"""s = dropout(x) A^T, tall and skinny, in one pass over x."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rounding import cdiv
from .dropout import Dropout, DropoutRate, keep_tile
from .launch import KEPT_LAUNCHES, launchable
from .launch_sequence import LaunchSequence, Slot
from .partials import add_summed, rank_tile, split_count
from .planner import capability_for

BLOCK_M = 64
NUM_WARPS, NUM_STAGES = 4, 3


def block_k_of(dtype: torch.dtype) -> int:
    """Return the step along K.

    In fp32, each step is one chain of FMAs, and its rounding error in s is multiplied by scaling * B: chains of 64
    exceeded the error bound at M=1, K=64. Shorter steps make more splits and shorter chains.
    """
    return 32 if dtype == torch.float32 else 64


@launchable
@triton.jit
def lora_down_kernel(
    p_x,
    p_lora_A,
    p_seed,
    p_s,
    p_copy,
    M,
    K,
    R,
    steps,
    stride_A_r,
    stride_A_k,
    stride_copy,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[i_split, m, r] = scale * sum over `steps` tiles of K of keep(m, k) * x[m, k] * A[r, k], [splits, M, R].

    Grid (tiles of M, splits of K, tiles of R). Each program stores its own part, in fp32; a second launch
    (sum_partials) adds the splits in order and applies dropout's scale. With one split the only part is s itself. A is
    used in x's dtype. Its strides allow a transposed one, such as lora_B for ds = grad_y B. A may hold the stacked rows
    of several adapters: linears with the same x share one launch.
    COPY: the programs of the first tile of R also store x to copy [M, K], whose rows have a stride.
    """
    i_m, i_split, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    row_m = tl.where(o_m < M, o_m, 0).to(tl.int64)
    row_r = tl.where(o_r < R, o_r, 0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    if DROPOUT:
        seed = tl.load(p_seed)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = i_split * steps
    for i in range(first, min(first + steps, tl.cdiv(K, BLOCK_K))):
        column = i * BLOCK_K + o_k
        b_x = tl.load(p_x + row_m[:, None] * K + column[None, :], mask=column[None, :] < K, other=0.0)
        o_A = row_r[None, :] * stride_A_r + column[:, None].to(tl.int64) * stride_A_k
        b_A = tl.load(p_lora_A + o_A, mask=column[:, None] < K, other=0.0)
        if COPY:
            p_tile = p_copy + row_m[:, None] * stride_copy + column[None, :]
            tl.store(p_tile, b_x, mask=(o_m[:, None] < M) & (column[None, :] < K) & (i_r == 0))
        if DROPOUT:
            keep = keep_tile(seed, threshold, i_m * BLOCK_M, i * BLOCK_K, K, DROPOUT, BLOCK_M, BLOCK_K)
            b_x = tl.where(keep, b_x, 0.0)
        acc = tl.dot(b_x, b_A.to(b_x.dtype), acc, input_precision="ieee")
    o_s = (i_split.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :]
    tl.store(p_s + o_s, (acc * scale).to(p_s.dtype.element_ty), mask=(o_m[:, None] < M) & (o_r[None, :] < R))


def add_lora_down(
    sequence: LaunchSequence,
    x: Slot,
    lora_A: Slot,
    seed: Slot,
    copy: Slot | None,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    capability: int,
    rate: DropoutRate,
    *,
    transposed: bool = False,
    stride_copy: int = 0,
) -> Slot:
    """Add s = dropout(x) A^T to a sequence; return the slot of s [M, r].

    sizes: (M, K, r).   transposed: lora_A is [K, r].   copy: receives x; None without a copy.
    """
    M, K, r = sizes
    block_r, block_k = rank_tile(r, dtype), block_k_of(dtype)
    steps, splits = splits_of_down(M, K, r, dtype, capability)
    launch = lora_down_kernel.prepare(
        (cdiv(M, BLOCK_M), splits, cdiv(r, block_r)),
        (
            *(M, K, r, steps),
            *((1, r) if transposed else (K, 1)),
            *(stride_copy, rate.threshold, rate.scale if splits == 1 else 1.0),
        ),
        DROPOUT=rate.elements_per_philox_call(K),
        COPY=copy is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return add_summed(
        sequence,
        launch,
        lambda out: (x, lora_A, seed, out, x if copy is None else copy),
        splits,
        (M, r),
        rate.scale,
        dtype,
    )


def splits_of_down(M: int, K: int, r: int, dtype: torch.dtype, capability: int) -> tuple[int, int]:
    """Return (steps of a split, splits of K), which are the parts of s."""
    tiles = cdiv(M, BLOCK_M) * cdiv(r, rank_tile(r, dtype))
    return split_count(cdiv(K, block_k_of(dtype)), tiles, capability)


def lora_down(x: Tensor, lora_A: Tensor, dropout: Dropout, copy: Tensor | None = None) -> Tensor:
    """Return s [M, r] of x.dtype from x [M, K] and lora_A [r, K], both contiguous.

    copy: receives x where it is given; [M, K] with contiguous rows, which may have a stride.
    """
    M, K = x.shape
    stride_copy = None if copy is None else copy.stride(0)
    sequence = _sequence((M, K, lora_A.shape[0]), x.dtype, capability_for(x), dropout.rate, stride_copy)
    (s,) = sequence(x, lora_A, dropout.seed, x if copy is None else copy)
    return s


@lru_cache(maxsize=KEPT_LAUNCHES)
def _sequence(
    sizes: tuple[int, int, int], dtype: torch.dtype, capability: int, rate: DropoutRate, stride_copy: int | None
) -> LaunchSequence:
    """Return the launches of (x, lora_A, seed, copy). stride_copy: None without a copy of x."""
    sequence = LaunchSequence(inputs=4)
    copy = None if stride_copy is None else 3
    s = add_lora_down(sequence, 0, 1, 2, copy, sizes, dtype, capability, rate, stride_copy=stride_copy or 0)
    sequence.returns(s)
    return sequence
