"""Double quantization: absmax stored in 8 bits.

    offset       = mean(absmax)                                              fp32 scalar
    absmax_scale = max|absmax - offset| over each 256 constants              fp32 [ceil(n_blocks / 256)]
    absmax_q     = index of the map value nearest to (absmax - offset) * (1 / absmax_scale)
    absmax      ~= map[absmax_q] * absmax_scale + offset                     fp32 product, then fp32 sum: two roundings

This turns 32 / 64 = 0.5 bit per weight into 8 / 64 + 32 / (64 * 256) = 0.127.

The map is the signed dynamic 8-bit code: one sign bit, a unary exponent of 0..6 zeros, and the remaining bits as a
linear fraction, so that steps are fine near zero and coarse near one. "Nearest" is exact: the index is the number of
fp32 midpoints of neighbours strictly below the value, so that a tie takes the lower index, as everywhere in this
format. A scale below nf4.SMALLEST_ABSMAX is stored as 0, and its constants take the index of the map's exact zero. The
order in which the mean is summed depends on the device; given the offset, everything else is bit-exact.

Source: QLoRA (arXiv:2305.14314) section 3, "Double Quantization"; the map: 8-bit Approximations for Parallelism in Deep
Learning (arXiv:1511.04561) and 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861) section 2.2.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..rounding import cdiv
from .nf4 import SMALLEST_ABSMAX

NESTED_BLOCKSIZE = 256
"""Number of first-level constants per second-level scale."""


@cache
def dynamic_map_values(signed: bool = True) -> tuple[float, ...]:
    """The 256 values of the dynamic map in increasing order, each exact in fp32.

    For exponent i in 0..6 the fractions are the midpoints of 2**i (signed) or 2**(i+1) (unsigned) equal cells of
    [0.1, 1], times 10**(i - 6). 0 and 1 complete the map; the signed map has no -1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _edges(2 ** (exponent if signed else exponent + 1))
        magnitudes = ((edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (exponent - 6))).tolist()
        values += magnitudes
        if signed:
            values += [-magnitude for magnitude in magnitudes]
    return tuple(float(v) for v in np.sort(np.asarray(values, dtype=np.float32)))


def _edges(cells: int) -> npt.NDArray[np.float32]:
    """`cells` + 1 points from 0.1 to 1, fp32, by torch.linspace's formula with fused multiply-adds.

    The two halves start from opposite ends: fma(i, step, 0.1) and fma(-i, step, 1). The published map was built by a
    torch.linspace with fused multiply-adds, and its values are part of the checkpoint format. On a CPU without that
    instruction torch also rounds the product, so the map must not be computed by torch. Products and sums are exact in
    double.
    """
    start, end = np.float32(0.1), np.float32(1.0)
    step = float((end - start) / np.float32(cells))
    i = np.arange(cells + 1, dtype=np.float64)
    from_start, from_end = float(start) + step * i, float(end) - step * i[::-1]
    return np.where(i < (cells + 1) // 2, from_start, from_end).astype(np.float32)


def dynamic_map(device: torch.device | str | None = None, *, signed: bool = True) -> Tensor:
    """Return the dynamic map, fp32 [256]."""
    return torch.tensor(dynamic_map_values(signed), dtype=torch.float32, device=device)


def dynamic_boundaries(device: torch.device | str | None = None, *, signed: bool = True) -> Tensor:
    """Return the decision boundaries, fp32 [255]: midpoints, rounded to fp32, of neighbouring map values."""
    values = dynamic_map(device, signed=signed)
    return (values[:-1] + values[1:]) / 2


def quantize_absmax(absmax: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [n] -> (absmax_q uint8 [n], absmax_scale fp32 [ceil(n / 256)], absmax_offset fp32 []).

    offset: the mean to use, if a device summed in another order and got another last bit; default torch's mean.
    """
    if offset is None:
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    n = absmax.numel()
    blocks = cdiv(n, NESTED_BLOCKSIZE)
    centred = torch.zeros(blocks * NESTED_BLOCKSIZE, dtype=torch.float32, device=absmax.device)
    centred[:n] = absmax.reshape(-1) - offset
    centred = centred.view(blocks, NESTED_BLOCKSIZE)
    scale = centred.abs().amax(dim=1) if blocks else absmax.new_zeros(0)
    scale = torch.where(scale < SMALLEST_ABSMAX, 0.0, scale)
    normalized = centred * torch.where(scale > 0, 1.0 / scale, 0.0)[:, None]
    q = torch.bucketize(normalized, dynamic_boundaries(absmax.device)).to(torch.uint8)
    return q.reshape(-1)[:n].contiguous(), scale, offset


def dequantize_absmax(absmax_q: Tensor, absmax_scale: Tensor, absmax_offset: Tensor) -> Tensor:
    """uint8 [n], fp32 [ceil(n / 256)], fp32 [] -> fp32 [n]: map[absmax_q] * absmax_scale + absmax_offset."""
    q = absmax_q.reshape(-1)
    scale = absmax_scale.reshape(-1).repeat_interleave(NESTED_BLOCKSIZE)[: q.numel()]
    return dynamic_map(q.device)[q.long()] * scale + absmax_offset
