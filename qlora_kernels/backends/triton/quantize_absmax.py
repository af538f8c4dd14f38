"""Quantization of absmax to 8 bits: mean, scales and codes in one launch, without reads by the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...format import nf4
from ...format.double_quant import NESTED_BLOCKSIZE, dynamic_map_values
from ...rounding import cdiv
from .constants import absmax_boundaries
from .launch import launchable

NUM_WARPS = 4
SUM_VALUES = 4096
MAX_PROGRAMS = 64
"""Number of programs. Each of them sums all constants, so their number bounds the traffic: 64 x 1 MB from L2 for a 4096
x 4096 weight. The alternatives cost more: a second launch, or programs that wait for each other and must be
co-resident."""

SMALLEST_SCALE = tl.constexpr(nf4.SMALLEST_ABSMAX)
ZERO_INDEX = tl.constexpr(dynamic_map_values().index(0.0))
NESTED = tl.constexpr(NESTED_BLOCKSIZE)


@launchable
@triton.jit
def quantize_absmax_kernel(
    p_absmax, p_boundaries, p_absmax_q, p_absmax_scale, p_absmax_offset, n_blocks, SUM_VALUES: tl.constexpr
):
    """offset = mean(absmax); for each 256 constants, scale = max|absmax - offset| and q = nearest map value.

    Every program computes the mean in the same order in fp64, so that all programs get the same bits, the fp64 mean
    rounded once. It then processes every num_programs-th nested block. q is the number of midpoints strictly below
    fp32((absmax - offset) * fp32(1 / scale)), found by eight steps of binary search in a table that stays in L1.
    """
    o_sum = tl.arange(0, SUM_VALUES)
    total = tl.zeros((SUM_VALUES,), tl.float64)
    for i in range(0, n_blocks, SUM_VALUES):
        total += tl.load(p_absmax + i + o_sum, mask=i + o_sum < n_blocks, other=0.0).to(tl.float64)
    offset = (tl.sum(total, axis=0) / n_blocks.to(tl.float64)).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(p_absmax_offset, offset)

    o_nested = tl.arange(0, NESTED)
    for i_nested in range(tl.program_id(0), tl.cdiv(n_blocks, NESTED), tl.num_programs(0)):
        o_block = i_nested * NESTED + o_nested
        m_block = o_block < n_blocks
        centred = tl.load(p_absmax + o_block, mask=m_block, other=0.0) - offset
        centred = tl.where(m_block, centred, 0.0)
        scale = tl.max(tl.abs(centred), axis=0)
        scale = tl.where(scale < SMALLEST_SCALE, 0.0, scale)
        x = centred * tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale))
        q = tl.zeros((NESTED,), tl.int32)
        for step in tl.static_range(8):
            half = 128 >> step
            q += tl.where(tl.load(p_boundaries + q + half - 1) < x, half, 0)
        q = tl.where(scale == 0.0, ZERO_INDEX, q)
        tl.store(p_absmax_q + o_block, q.to(tl.uint8), mask=m_block)
        tl.store(p_absmax_scale + i_nested, scale)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (absmax_q, absmax_scale, absmax_offset). See ops/quantize_nf4.py for the contract."""
    n_blocks = absmax.numel()
    nested_blocks = cdiv(n_blocks, NESTED_BLOCKSIZE)
    absmax_q = torch.empty(n_blocks, dtype=torch.uint8, device=absmax.device)
    absmax_scale = torch.empty(nested_blocks, dtype=torch.float32, device=absmax.device)
    absmax_offset = torch.empty((), dtype=torch.float32, device=absmax.device)
    quantize_absmax_kernel[(min(nested_blocks, MAX_PROGRAMS),)](
        absmax,
        absmax_boundaries(absmax.device),
        absmax_q,
        absmax_scale,
        absmax_offset,
        n_blocks,
        SUM_VALUES=SUM_VALUES,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return absmax_q, absmax_scale, absmax_offset
