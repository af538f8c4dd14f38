"""Reference NF4 quantization and dequantization in plain torch, on any device.

Every kernel of every backend is compared with these functions bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import nf4
from .quant_state import n_blocks


def quantize_nf4(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Any shape, fp32/bf16/fp16 -> (packed uint8 [(numel + 1) // 2], absmax fp32 [n_blocks]).

    A block with an inf or a NaN gets a non-finite absmax, by which callers detect it; its indices are meaningless.
    """
    n = w.numel()
    blocks = n_blocks(n, blocksize)
    padded = torch.zeros(blocks * blocksize, dtype=torch.float32, device=w.device)
    padded[:n] = w.reshape(-1)
    padded = padded.view(blocks, blocksize)
    absmax = padded.abs().amax(dim=1) if blocks else padded.new_zeros(0)
    absmax = torch.where(absmax < nf4.SMALLEST_ABSMAX, 0.0, absmax)
    normalized = padded * torch.where(absmax > 0, 1.0 / absmax, 0.0)[:, None]
    # bucketize counts the boundaries strictly below the value; NaN would get the index 16.
    q = torch.bucketize(normalized, nf4.boundaries(w.device)).clamp_(max=15).to(torch.uint8)
    return nf4.pack(q.reshape(-1)[:n]), absmax


def dequantize_nf4(packed: Tensor, absmax: Tensor, blocksize: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return w[i] = CODE[q[i]] * absmax[i // blocksize], computed in fp32, rounded once to `dtype`, of shape
    `shape`.
    """
    n = torch.Size(shape).numel()
    q = nf4.unpack(packed, n).long()
    scale = absmax.reshape(-1).repeat_interleave(blocksize)[:n]
    return (nf4.code(packed.device)[q] * scale).to(dtype).reshape(shape)
