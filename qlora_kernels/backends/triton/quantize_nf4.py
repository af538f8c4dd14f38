"""Weights to packed indices and absmax, one launch, bit-equal to format/reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...format import nf4

NUM_WARPS = 4
PROGRAM_VALUES = 4096

BOUNDARIES = tl.constexpr(tuple(nf4.boundaries("cpu").tolist()))
SMALLEST_ABSMAX = tl.constexpr(nf4.SMALLEST_ABSMAX)
ZERO_INDEX = tl.constexpr(nf4.ZERO_INDEX)


@triton.jit
def encode(x):
    """Number of decision boundaries strictly below x, int32 in 0..15.

    Four comparisons down a binary tree; at each level the boundary to compare with is selected by the bits found so far
    (11 selects), where counting all 15 would take 15 comparisons and 15 additions.
    """
    b3 = x > BOUNDARIES[7]
    b2 = x > tl.where(b3, BOUNDARIES[11], BOUNDARIES[3])
    b1 = x > tl.where(
        b3, tl.where(b2, BOUNDARIES[13], BOUNDARIES[9]), tl.where(b2, BOUNDARIES[5], BOUNDARIES[1])
    )
    upper = tl.where(
        b2, tl.where(b1, BOUNDARIES[14], BOUNDARIES[12]), tl.where(b1, BOUNDARIES[10], BOUNDARIES[8])
    )
    lower = tl.where(b2, tl.where(b1, BOUNDARIES[6], BOUNDARIES[4]), tl.where(b1, BOUNDARIES[2], BOUNDARIES[0]))
    b0 = x > tl.where(b3, upper, lower)
    return b3.to(tl.int32) * 8 + b2.to(tl.int32) * 4 + b1.to(tl.int32) * 2 + b0.to(tl.int32)


@triton.jit
def quantize_nf4_kernel(p_w, p_packed, p_absmax, numel, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Each program quantizes BLOCKS whole blocks, a tile [BLOCKS, BLOCKSIZE] of the flattened weight.

    absmax = max|w| in fp32, 0 below the smallest normal number; q = encode(w * fp32(1 / absmax)), the reciprocal and the
    product each rounded to fp32 (IEEE division, not the approximate one). Elements beyond numel read as 0, whose index
    is the code's zero, which is also what pads an odd tail's low nibble.
    """
    i_first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE)
    p_w += i_first
    p_packed += i_first // 2
    p_absmax += tl.program_id(0).to(tl.int64) * BLOCKS
    values_left = numel - i_first

    o_block = tl.arange(0, BLOCKS)
    o_value = o_block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    b_w = tl.load(p_w + o_value, mask=o_value < values_left, other=0.0).to(tl.float32)
    b_absmax = tl.max(tl.abs(b_w), axis=1)
    # NaN must reach absmax, where the public function looks for it; a maximum alone drops it.
    b_absmax = tl.where(tl.sum((b_w != b_w).to(tl.int32), axis=1) > 0, float("nan"), b_absmax)
    b_absmax = tl.where(b_absmax < SMALLEST_ABSMAX, 0.0, b_absmax)
    divisor = tl.where(b_absmax == 0.0, 1.0, b_absmax)
    inverse = tl.where(b_absmax == 0.0, 0.0, tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor))
    q = encode(b_w * inverse[:, None])
    q = tl.where(b_absmax[:, None] == 0.0, ZERO_INDEX, q)

    high, low = tl.split(tl.reshape(q, (BLOCKS, BLOCKSIZE // 2, 2)))
    o_byte = o_block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(p_packed + o_byte, (high * 16 + low).to(tl.uint8), mask=2 * o_byte < values_left)
    tl.store(p_absmax + o_block, b_absmax, mask=o_block * BLOCKSIZE < values_left)


def quantize_nf4(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed, absmax) of contiguous w. See ops/quantize_nf4.py for the contract."""
    numel = w.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(triton.cdiv(numel, blocksize), dtype=torch.float32, device=w.device)
    quantize_nf4_kernel[(triton.cdiv(numel, PROGRAM_VALUES),)](
        w, packed, absmax, numel, BLOCKSIZE=blocksize, BLOCKS=PROGRAM_VALUES // blocksize, num_warps=NUM_WARPS
    )
    return packed, absmax
