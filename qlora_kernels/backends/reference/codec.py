"""quantize_nf4, quantize_absmax and dequantize_nf4 through format/reference.py."""

from __future__ import annotations

from torch import Tensor

from ...format import double_quant, reference
from ...format.quant_state import first_level


def quantize_nf4(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """See format/reference.py."""
    return reference.quantize_nf4(w, blocksize)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See format/double_quant.py."""
    return double_quant.quantize_absmax(absmax)


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    out: Tensor,
) -> None:
    """out = code[q] * absmax."""
    scales = first_level(absmax, absmax_q, absmax_scale, absmax_offset)
    out.copy_(reference.dequantize_nf4(packed, scales, blocksize, out.shape, out.dtype))
