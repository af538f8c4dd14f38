"""The NF4 code: the value of each 4-bit index, and the index of each number.

This file is the specification. Every other copy of a code value (the C++ header csrc/include/qlora/nf4_code.h, the
Triton tables, the checkpoints' quant_map) is generated from it or compared with it bit for bit.

A weight tensor is flattened row-major and cut into blocks of `blocksize` elements; blocks may straddle rows and the
last one may be short. Each block keeps `absmax = max|w|` in fp32 and each element a 4-bit index `q`:

    quantize     q = number of boundaries strictly below w * (1 / absmax)      (a tie takes the lower index)
    dequantize   w_hat = CODE[q] * absmax                                      (rounded once, to the output dtype)

The reciprocal and the product are each rounded to fp32, in short blocks as well as in full ones.

Rules at the edges:
    nibbles      element 2i in the high nibble of byte i, element 2i+1 in the low nibble.
    odd tail     the missing low nibble holds ZERO_INDEX.
    zero block   max|w| below SMALLEST_ABSMAX: absmax 0, all indices ZERO_INDEX, so it dequantizes to +0.0.
    inf, NaN     cannot be represented. Quantization raises; see `reference.quantize_nf4`.

docs/format.md lists the differences between other implementations of NF4 and these rules.

Source: QLoRA (arXiv:2305.14314) section 3 and appendix E: quantiles of N(0, 1), eight on the negative side, nine on the
positive side, sharing an exact zero, scaled to [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 code values; each is exact in fp32."""

ZERO_INDEX = 7
"""Index of the exact zero, used for padding and all-zero blocks."""

SMALLEST_ABSMAX = 2.0**-126
"""The smallest normal fp32 number. Below it 1 / absmax overflows, and flush-to-zero modes give other results."""

BLOCKSIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Permitted numbers of elements per absmax."""

DEFAULT_BLOCKSIZE = 64


def code(device: torch.device | str | None = None) -> Tensor:
    """Return the 16 code values of CODE, fp32 [16]."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


def boundaries(device: torch.device | str | None = None) -> Tensor:
    """Return the decision boundaries, fp32 [15]: the fp32 midpoints of neighbouring code values."""
    values = code(device)
    return (values[:-1] + values[1:]) / 2


def pack(q: Tensor) -> Tensor:
    """Pack two indices per byte: uint8 [n], values 0..15 -> uint8 [(n + 1) // 2], even elements in the high nibble."""
    if q.numel() % 2:
        q = torch.cat([q, q.new_full((1,), ZERO_INDEX)])
    return (q[0::2] << 4) | q[1::2]


def unpack(packed: Tensor, numel: int) -> Tensor:
    """Reverse `pack`: uint8 [(numel + 1) // 2] of any shape -> uint8 [numel]."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 0xF], dim=1).reshape(-1)[:numel]
