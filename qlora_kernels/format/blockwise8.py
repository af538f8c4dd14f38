"""Optimizer states in 8 bits: the dynamic map over blocks of 256, signed for exp_avg, unsigned for exp_avg_sq.

    absmax = max|x| over each block                                      fp32 [ceil(n / 256)]
    q      = number of map midpoints strictly below x * (1 / absmax)     uint8 [n], a tie takes the lower index
    x     ~= map[q] * absmax                                             one fp32 product

A block whose absmax is below SMALLEST_ABSMAX, so that its reciprocal is not finite, is stored with absmax 0. Bytes that
are all zero therefore represent an all-zero state under either map. 8 + 32 / 256 = 8.125 bits per element.

Source: 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861) sections 2.1 and 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rounding import cdiv
from .double_quant import dynamic_boundaries, dynamic_map
from .nf4 import SMALLEST_ABSMAX

STATE_BLOCKSIZE = 256
"""Elements per absmax."""


def quantize_blockwise(x: Tensor, *, signed: bool, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """fp32, any shape -> (q uint8 [n], absmax fp32 [ceil(n / 256)]) of the flattened tensor.

    absmax: known constants of the blocks, or None to compute them. With the constants that were given to
    `dequantize_blockwise`, its result is quantized to the original bytes. Without them, a block whose value of largest
    magnitude is negative may not be, because the signed map has no -1.
    """
    n = x.numel()
    blocks = cdiv(n, STATE_BLOCKSIZE)
    padded = torch.zeros(blocks * STATE_BLOCKSIZE, dtype=torch.float32, device=x.device)
    padded[:n] = x.reshape(-1)
    padded = padded.view(blocks, STATE_BLOCKSIZE)
    if absmax is None:
        absmax = padded.abs().amax(dim=1) if blocks else padded.new_zeros(0)
        absmax = torch.where(absmax < SMALLEST_ABSMAX, 0.0, absmax)
    normalized = padded * torch.where(absmax > 0, 1.0 / absmax, 0.0)[:, None]
    # Without the clamp, a NaN would get the index 256.
    q = torch.bucketize(normalized, dynamic_boundaries(x.device, signed=signed)).clamp_(max=255).to(torch.uint8)
    return q.reshape(-1)[:n].contiguous(), absmax


def dequantize_blockwise(q: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """uint8 [n], fp32 [ceil(n / 256)] -> fp32 [n]."""
    scale = absmax.repeat_interleave(STATE_BLOCKSIZE)[: q.numel()]
    return dynamic_map(q.device, signed=signed)[q.reshape(-1).long()] * scale
