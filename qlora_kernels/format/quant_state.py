"""QuantState: the shape, dtype and constants that are needed to dequantize packed indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import nf4
from .double_quant import NESTED_BLOCKSIZE, dequantize_absmax, dynamic_map

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights and activations may have."""

DTYPE_CODES = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES)}
"""The number of each dtype in the native libraries; enum DType of nf4_code.h is generated from it."""

Constants = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""(absmax, None, None, None) or (None, absmax_q, absmax_scale, absmax_offset): a weight's constants as op arguments."""


def n_blocks(numel: int, blocksize: int) -> int:
    """Return the number of blocks of a tensor of `numel` elements."""
    return (numel + blocksize - 1) // blocksize  # without cdiv, because each call of an op runs this


@dataclass(frozen=True, eq=False, init=False)
class QuantState:
    """Shape, dtype and block constants of one NF4 tensor; immutable and checked on construction.

    shape: of the weight before quantization.   dtype: of the weight before quantization (fp32, bf16 or fp16).
    blocksize: elements per absmax.
    Exactly one kind of constants is given:
      absmax: fp32 [n_blocks], without double quantization; or
      absmax_q: uint8 [n_blocks], absmax_scale: fp32 [ceil(n_blocks / 256)], absmax_offset: fp32 [], with it.
    The attribute `absmax` exists for both kinds; it is decoded on access if it is not stored.
    Raises ValueError or TypeError, naming the field, if the fields are not consistent.
    """

    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    _stored_absmax: Tensor | None
    absmax_q: Tensor | None
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        blocksize: int,
        absmax: Tensor | None = None,
        absmax_q: Tensor | None = None,
        absmax_scale: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> None:
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"QuantState: dtype must be one of {FLOAT_DTYPES}, got {dtype}")
        if blocksize not in nf4.BLOCKSIZES:
            raise ValueError(f"QuantState: blocksize must be one of {nf4.BLOCKSIZES}, got {blocksize}")
        if absmax is None and (absmax_q is None or absmax_scale is None or absmax_offset is None):
            raise ValueError(
                "QuantState: either absmax or all of absmax_q, absmax_scale and absmax_offset must be given"
            )
        if absmax is not None and any(t is not None for t in (absmax_q, absmax_scale, absmax_offset)):
            raise ValueError("QuantState: absmax excludes absmax_q, absmax_scale and absmax_offset, got both")
        given = (torch.Size(shape), dtype, blocksize, absmax, absmax_q, absmax_scale, absmax_offset)
        for field, value in zip(fields(self), given, strict=True):
            object.__setattr__(self, field.name, value)  # the class is frozen
        blocks = n_blocks(self.numel, blocksize)
        _expect("absmax", absmax, torch.float32, blocks)
        _expect("absmax_q", absmax_q, torch.uint8, blocks)
        _expect("absmax_scale", absmax_scale, torch.float32, n_blocks(blocks, NESTED_BLOCKSIZE))
        _expect("absmax_offset", absmax_offset, torch.float32, 1)

    @property
    def numel(self) -> int:
        """The number of weights in the tensor."""
        return self.shape.numel()

    @property
    def double_quant(self) -> bool:
        """Whether the constants are stored in 8 bits."""
        return self.absmax_q is not None

    @property
    def constants(self) -> Constants:
        """The four constants in the order in which every op takes them."""
        return self._stored_absmax, self.absmax_q, self.absmax_scale, self.absmax_offset

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude of each block, fp32 [n_blocks]; under double quantization decoded on each access."""
        return decoded_absmax(*self.constants)

    @property
    def absmax_code(self) -> Tensor | None:
        """The map that absmax_q indexes, fp32 [256]; None without double quantization."""
        return None if self.absmax_q is None else dynamic_map(self.absmax_q.device)

    @property
    def nbytes(self) -> int:
        """The bytes of packed indices and constants; the shared code tables are not counted."""
        return (self.numel + 1) // 2 + sum(t.nbytes for t in self.constants if t is not None)

    @property
    def bits_per_param(self) -> float:
        """Stored bits per weight: 4.5 for blocks of 64, 4.127 with double quantization."""
        return 8 * self.nbytes / max(self.numel, 1)

    def to(self, device: torch.device | str) -> QuantState:
        """Return the same state with its constants on `device`."""
        moved = [None if t is None else t.to(device) for t in self.constants]
        return QuantState(self.shape, self.dtype, self.blocksize, *moved)


def decoded_absmax(
    absmax: Tensor | None, absmax_q: Tensor | None, absmax_scale: Tensor | None, absmax_offset: Tensor | None
) -> Tensor:
    """Return absmax, fp32 [n_blocks], from either kind of constants.

    Raises ValueError if neither absmax nor all three of the others are given.
    """
    if absmax is not None:
        return absmax
    if absmax_q is None or absmax_scale is None or absmax_offset is None:
        raise ValueError("decoded_absmax: either absmax or all of absmax_q, absmax_scale, absmax_offset must be given")
    return dequantize_absmax(absmax_q, absmax_scale, absmax_offset)


def _expect(name: str, tensor: Tensor | None, dtype: torch.dtype, numel: int) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"QuantState: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.numel() != numel:
        raise ValueError(f"QuantState: {name} must have {numel} elements, got {tensor.numel()}")
