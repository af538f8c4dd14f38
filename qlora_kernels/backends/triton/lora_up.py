"""out = parts + scaling * left right + bias: the low-rank update, and the last stage of a split matmul."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rounding import cdiv
from .dropout import Dropout, DropoutRate, keep_tile
from .launch import KEPT_LAUNCHES, Launch, launchable
from .partials import rank_tile

BLOCK_M, BLOCK_C = 32, 128
NUM_WARPS = 4


@launchable
@triton.jit
def lora_up_kernel(
    p_parts,
    p_left,
    p_right,
    p_bias,
    p_seed,
    p_out,
    M,
    C,
    R,
    parts,
    stride_right_r,
    stride_right_c,
    scaling,
    threshold,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[m, c] = sum_p parts[p, m, c] + scaling * keep(m, c) * sum_r left[m, r] * right[r, c] + bias[c].

    One tile [BLOCK_M, BLOCK_C] per program; fp32 sums in fixed order, rounded once. parts is fp32 [parts, M, C] from a
    split matmul, or out itself with parts == 1: each program reads its tile before it writes it.
    forward:   left = s, right = B^T, scaling = lora_alpha / r.
    backward:  left = ds, right = A, scaling = dropout's scale, keep = the forward mask.
    """
    i_m, i_c = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_out = (o_m[:, None] < M) & (o_c[None, :] < C)
    o_out = o_m[:, None].to(tl.int64) * C + o_c[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if HAS_LORA:
        row_m = tl.where(o_m < M, o_m, 0).to(tl.int64)
        m_c = o_c[None, :] < C
        for i_r in range(0, R, BLOCK_R):
            o_r = i_r + tl.arange(0, BLOCK_R)
            b_left = tl.load(p_left + row_m[:, None] * R + o_r[None, :], mask=o_r[None, :] < R, other=0.0)
            p_tile = p_right + o_r[:, None].to(tl.int64) * stride_right_r + o_c[None, :].to(tl.int64) * stride_right_c
            b_right = tl.load(p_tile, mask=(o_r[:, None] < R) & m_c, other=0.0)
            acc = tl.dot(b_left, b_right.to(b_left.dtype), acc, input_precision="ieee")
        acc *= scaling
        if DROPOUT:
            keep = keep_tile(tl.load(p_seed), threshold, i_m * BLOCK_M, i_c * BLOCK_C, C, DROPOUT, BLOCK_M, BLOCK_C)
            acc = tl.where(keep, acc, 0.0)
    base = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    p_part = p_parts + o_out
    for _ in range(parts):
        base += tl.load(p_part, mask=m_out, other=0.0).to(tl.float32)
        p_part += tl.cast(M, tl.int64) * C
    acc += base
    if HAS_BIAS:
        acc += tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m_out)


@lru_cache(maxsize=KEPT_LAUNCHES)
def up_launch(
    M: int,
    C: int,
    r: int | None,
    dtype: torch.dtype,
    parts: int,
    scaling: float,
    has_bias: bool,
    rate: DropoutRate,
    right_is_transposed: bool,
) -> Launch:
    """Return the launch of (parts, left, right, bias, seed, out). r: None without a low-rank update.

    right_is_transposed: right is lora_B [C, r], not lora_A [r, C].
    """
    R = 1 if r is None else r
    strides = (1, R) if right_is_transposed else (C, 1)
    return lora_up_kernel.prepare(
        (cdiv(M, BLOCK_M), cdiv(C, BLOCK_C)),
        (M, C, R, parts, *strides, scaling, rate.threshold),
        HAS_LORA=r is not None,
        HAS_BIAS=has_bias,
        DROPOUT=rate.elements_per_philox_call(C),
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        BLOCK_R=rank_tile(R, dtype),
        num_warps=NUM_WARPS,
    )


def lora_up(
    out: Tensor,
    *,
    left: Tensor | None,
    right: Tensor | None,
    right_is_transposed: bool,
    scaling: float,
    bias: Tensor | None,
    dropout: Dropout,
) -> None:
    """Add to out [M, C] in place.

    left: [M, R] of out's dtype; right: [C, R] if right_is_transposed (lora_B), else [R, C] (lora_A); both contiguous.
    """
    r = None if left is None else left.shape[1]
    M, C = out.shape
    launch = up_launch(M, C, r, out.dtype, 1, float(scaling), bias is not None, dropout.rate, right_is_transposed)
    launch(
        out,
        out if left is None else left,
        out if right is None else right,
        out if bias is None else bias,
        dropout.seed,
        out,
    )
