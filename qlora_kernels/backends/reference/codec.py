"""quantize_nf4, quantize_absmax and dequantize_nf4 through format/reference.py."""

from __future__ import annotations

from torch import Tensor

from ...format import double_quant, reference
from ...format.quant_state import decoded_absmax
from ...ops.operands import Weight


def quantize_nf4(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return (packed, absmax) of w by format/reference.py."""
    return reference.quantize_nf4(w, blocksize)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (absmax_q, absmax_scale, absmax_offset) by format/double_quant.py."""
    return double_quant.quantize_absmax(absmax)


def dequantize_nf4(weight: Weight, *, out: Tensor) -> None:
    """Write code[q] * absmax into out."""
    out.copy_(
        reference.dequantize_nf4(
            weight.packed, decoded_absmax(*weight.constants), weight.blocksize, out.shape, out.dtype
        )
    )
