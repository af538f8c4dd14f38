"""dequantize_nf4: packed indices and constants back to numbers.

Ops: qlora_kernels::dequantize_nf4 and its out variant.

Kernel contract:
    run(packed, absmax, absmax_q, absmax_scale, absmax_offset, *, blocksize, out) -> None     out contiguous, numel >= 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from ._checks import check_float, check_weight
from ._implement import fake, implement
from ._registry import Problem, select

_CONSTANTS = "Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_offset"
torch.library.define(
    "qlora_kernels::dequantize_nf4",
    f"({_CONSTANTS}, *, int blocksize, SymInt[] shape, ScalarType dtype) -> Tensor",
)
torch.library.define("qlora_kernels::dequantize_nf4.out", f"({_CONSTANTS}, *, int blocksize, Tensor(a!) out) -> ()")


def dequantize_nf4(
    packed: Tensor, state: QuantState, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """w[i] = code[q[i]] * absmax[i // blocksize], computed in fp32 and rounded once, as a tensor of state.shape.

    packed: uint8 with (numel + 1) // 2 elements, element 2i in the high nibble.   state: from `quantize_nf4`.
    dtype: fp32, bf16 or fp16; defaults to the source weight's, or to out's.
    out: written and returned if given; shape state.shape, contiguous, on packed's device, any of the three dtypes.
    All backends agree bit for bit (tests/ops/test_dequantize_nf4.py).
    Raises ValueError or TypeError, naming the argument, where these do not fit together.
    Source: QLoRA (arXiv:2305.14314) section 3.
    """
    if out is None:
        result: Tensor = torch.ops.qlora_kernels.dequantize_nf4(
            packed, *state.constants, blocksize=state.blocksize, shape=state.shape, dtype=dtype or state.dtype
        )
        return result
    if out.shape != state.shape:
        raise ValueError(f"dequantize_nf4: out must have shape {tuple(state.shape)}, got {tuple(out.shape)}")
    if dtype is not None and dtype != out.dtype:
        raise TypeError(f"dequantize_nf4: dtype must equal out's {out.dtype} or be None, got {dtype}")
    torch.ops.qlora_kernels.dequantize_nf4.out(packed, *state.constants, blocksize=state.blocksize, out=out)
    return out


@implement("qlora_kernels::dequantize_nf4")
def dequantize_nf4_impl(
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """A fresh tensor, filled by the out variant."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    dequantize_nf4_out_impl(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize=blocksize, out=out)
    return out


@implement("qlora_kernels::dequantize_nf4.out")
def dequantize_nf4_out_impl(
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    out: Tensor,
) -> None:
    """Checks, then the selected kernel."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    dequantize_nf4_out_fake(packed, *constants, blocksize=blocksize, out=out)
    if out.numel() == 0:
        return
    problem = Problem(
        "dequantize_nf4",
        out.device.type,
        out.dtype,
        N=out.numel(),
        blocksize=blocksize,
        double_quant=absmax_q is not None,
    )
    select(problem).run(packed.contiguous(), *constants, blocksize=blocksize, out=out)


@fake("qlora_kernels::dequantize_nf4")
def dequantize_nf4_fake(
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Shape and dtype of the result."""
    out = packed.new_empty(shape, dtype=dtype)
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    dequantize_nf4_out_fake(packed, *constants, blocksize=blocksize, out=out)
    return out


@fake("qlora_kernels::dequantize_nf4.out")
def dequantize_nf4_out_fake(
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    out: Tensor,
) -> None:
    """The checks alone."""
    check_float("dequantize_nf4", "dtype of the result", out)
    if not out.is_contiguous():
        raise ValueError(f"dequantize_nf4: out must be contiguous, got strides {out.stride()}")
    check_weight(
        "dequantize_nf4",
        packed,
        absmax,
        absmax_q,
        absmax_scale,
        absmax_offset,
        blocksize=blocksize,
        numel=out.numel(),
        device=out.device,
    )
