"""Quantization and dequantization by csrc/cuda/quantize_nf4.cu and dequantize_nf4.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...format.double_quant import NESTED_BLOCKSIZE
from ...format.quant_state import n_blocks
from ...ops.operands import Weight

_C = torch.ops.qlora_kernels_C


def quantize_nf4(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return (packed, absmax) of a contiguous w, in one launch."""
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(n_blocks(w.numel(), blocksize), dtype=torch.float32)
    _C.cuda_quantize_nf4(w, blocksize, packed, absmax)
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (absmax_q, absmax_scale, absmax_offset) in two launches; the mean is summed in double in a fixed order."""
    absmax = absmax.contiguous()
    blocks = absmax.numel()
    partial_sums = absmax.new_empty(_C.cuda_absmax_partial_sums(blocks), dtype=torch.float64)
    absmax_q = absmax.new_empty(blocks, dtype=torch.uint8)
    absmax_scale = absmax.new_empty(n_blocks(blocks, NESTED_BLOCKSIZE))
    absmax_offset = absmax.new_empty(())
    _C.cuda_quantize_absmax(absmax, partial_sums, absmax_q, absmax_scale, absmax_offset)
    return absmax_q, absmax_scale, absmax_offset


def quantize_nf4_double(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (packed, absmax, absmax_q, absmax_scale, absmax_offset) of a contiguous w in two launches.

    The first launch also computes the partial sums for the second level's mean.
    """
    blocks = n_blocks(w.numel(), blocksize)
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(blocks, dtype=torch.float32)
    partial_sums = w.new_empty(_C.cuda_nf4_partial_sums(w.numel(), blocksize), dtype=torch.float64)
    absmax_q = w.new_empty(blocks, dtype=torch.uint8)
    absmax_scale = absmax.new_empty(n_blocks(blocks, NESTED_BLOCKSIZE))
    absmax_offset = absmax.new_empty(())
    second_level = (absmax_q, absmax_scale, absmax_offset)
    _C.cuda_quantize_nf4_double(w, blocksize, packed, absmax, partial_sums, *second_level)
    return packed, absmax, *second_level


def dequantize_nf4(weight: Weight, *, out: Tensor) -> None:
    """Dequantize both levels in one pass into out, contiguous or [N, K] with a stride between its rows."""
    _C.cuda_dequantize_nf4(weight.packed, *weight.constants, weight.blocksize, out)
