"""quantize_nf4: packed 4-bit indices and block constants of weights.

Ops: qlora_kernels::quantize_nf4 (first level), qlora_kernels::quantize_absmax (double quantization) and
qlora_kernels::quantize_nf4_double (both).

Kernel contract:
    quantize_nf4         run(w, *, blocksize) -> (packed, absmax)                   w contiguous, numel >= 1
    quantize_absmax      run(absmax) -> (absmax_q, absmax_scale, absmax_offset)     absmax contiguous, numel >= 1
    quantize_nf4_double  run(w, *, blocksize) -> (packed, absmax, absmax_q, absmax_scale, absmax_offset)
                         optional: a backend without it runs the other two
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..format import nf4
from ..format.double_quant import NESTED_BLOCKSIZE
from ..format.quant_state import QuantState, n_blocks
from ._implement import fake, implement, refuse_derivatives
from .checks import check_blocksize, check_float, check_given
from .registry import Problem, kernels_of, select
from .tensor_memory import contiguous

Nonfinite = Literal["raise", "zero"]

_LARGEST_SUM = 3.4e38
"""The largest permitted sum of a tensor's absmax, below fp32's range; backends that sum in fp32 overflow above it."""

torch.library.define("qlora_kernels::quantize_nf4", "(Tensor w, *, int blocksize) -> (Tensor, Tensor)")
torch.library.define("qlora_kernels::quantize_absmax", "(Tensor absmax) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "qlora_kernels::quantize_nf4_double", "(Tensor w, *, int blocksize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

BothLevels = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def quantize_nf4(
    w: Tensor,
    blocksize: int = nf4.DEFAULT_BLOCKSIZE,
    double_quant: bool = True,
    *,
    nonfinite: Nonfinite = "raise",
) -> tuple[Tensor, QuantState]:
    """Return (packed, state) with state.absmax[b] = max|w| over block b and q = nearest code of w / absmax.

    w: fp32, bf16 or fp16, any shape and layout, flattened row-major.   blocksize: elements per absmax.
    double_quant: store the constants in 8 bits (4.127 bits per weight instead of 4.5 at blocks of 64).
    nonfinite: "raise", or "zero" to quantize inf and NaN as zeros.
    Returns packed uint8 [(numel + 1) // 2, 1] on w's device, and its QuantState. Nothing is differentiable. A w on the
    meta device gives shapes and dtypes.
    Raises TypeError for other dtypes and for arguments of another kind; ValueError for a bad blocksize, with
    nonfinite="raise" for inf or NaN, and with double_quant for finite weights so large (about 1e38) that their
    constants' mean overflows.
    Source: QLoRA (arXiv:2305.14314) section 3; format/nf4.py is the specification.
    """
    if nonfinite not in ("raise", "zero"):
        raise ValueError(f'quantize_nf4: nonfinite must be "raise" or "zero", got {nonfinite!r}')
    if not isinstance(w, Tensor):
        raise TypeError(f"quantize_nf4: w must be a tensor, got {type(w).__name__}")
    check_blocksize("quantize_nf4", blocksize)
    w = w.detach()
    if nonfinite == "zero":
        w = torch.nan_to_num(w, nan=0.0, posinf=0.0, neginf=0.0)
    op = torch.ops.qlora_kernels.quantize_nf4_double if double_quant else torch.ops.qlora_kernels.quantize_nf4
    packed, absmax, *second_level = op(w, blocksize=blocksize)
    if not w.is_meta:  # which has shapes and no values
        _check_magnitudes(absmax, second_level[-1] if double_quant else None, nonfinite)
    packed = packed.unsqueeze(1)
    if not double_quant:
        return packed, QuantState(w.shape, w.dtype, blocksize, absmax=absmax)
    absmax_q, absmax_scale, absmax_offset = second_level
    state = QuantState(
        w.shape,
        w.dtype,
        blocksize,
        absmax_q=absmax_q,
        absmax_scale=absmax_scale,
        absmax_offset=absmax_offset,
    )
    return packed, state


def _check_magnitudes(absmax: Tensor, mean: Tensor | None, nonfinite: Nonfinite) -> None:
    """Raise ValueError for constants that are not finite, or too large for double quantization.

    absmax: fp32 [n_blocks].   mean: fp32 [], their mean, with double quantization.
    """
    # Magnitudes cannot cancel, so that any sum of them shows a non-finite one; a sum of finite ones may overflow,
    # however.
    total = (absmax.sum() if mean is None else mean).item()
    if nonfinite == "raise" and not math.isfinite(total) and not torch.isfinite(absmax).all():
        bad = int((~torch.isfinite(absmax)).sum())
        raise ValueError(
            f"quantize_nf4: w must be finite, got inf or NaN in {bad} of {absmax.numel()} blocks; "
            'clean the weight or pass nonfinite="zero"'
        )
    if mean is not None and not total * absmax.numel() < _LARGEST_SUM:
        raise ValueError(
            f"quantize_nf4: w must be small enough that the largest magnitudes of its {absmax.numel()} blocks sum to "
            "less than 3.4e38, since double quantization subtracts their mean; scale w or pass double_quant=False"
        )


@implement("qlora_kernels::quantize_nf4")
def quantize_nf4_impl(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """Check the arguments, then run the selected kernel."""
    check_float("quantize_nf4", "w", w)
    check_blocksize("quantize_nf4", blocksize)
    if w.numel() == 0:
        return quantize_nf4_fake(w, blocksize=blocksize)
    problem = Problem("quantize_nf4", w.device.type, w.dtype, N=w.numel(), blocksize=blocksize)
    packed, absmax = select(problem).run(contiguous("quantize_nf4", w), blocksize=blocksize)
    return packed, absmax


@fake("qlora_kernels::quantize_nf4")
def quantize_nf4_fake(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of the result."""
    check_float("quantize_nf4", "w", w)
    check_blocksize("quantize_nf4", blocksize)
    n = w.numel()
    packed = w.new_empty((n + 1) // 2, dtype=torch.uint8)
    return packed, w.new_empty(n_blocks(n, blocksize), dtype=torch.float32)


@implement("qlora_kernels::quantize_absmax")
def quantize_absmax_impl(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, then run the selected kernel."""
    _check_absmax(absmax)
    if absmax.numel() == 0:
        absmax_q, absmax_scale, absmax_offset = quantize_absmax_fake(absmax)
        return absmax_q, absmax_scale, absmax_offset.zero_()
    problem = Problem("quantize_absmax", absmax.device.type, absmax.dtype, N=absmax.numel())
    absmax_q, absmax_scale, absmax_offset = select(problem).run(contiguous("quantize_absmax", absmax))
    return absmax_q, absmax_scale, absmax_offset


@fake("qlora_kernels::quantize_absmax")
def quantize_absmax_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of the result."""
    _check_absmax(absmax)
    scales = n_blocks(absmax.numel(), NESTED_BLOCKSIZE)
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(scales), absmax.new_empty(())


@implement("qlora_kernels::quantize_nf4_double")
def quantize_nf4_double_impl(w: Tensor, *, blocksize: int) -> BothLevels:
    """Quantize w and then absmax, by one kernel if the backend has it, which saves a pass over absmax."""
    check_float("quantize_nf4", "w", w)
    check_blocksize("quantize_nf4", blocksize)
    if w.numel() == 0:
        packed, absmax = quantize_nf4_fake(w, blocksize=blocksize)
        return packed, absmax, *quantize_absmax_impl(absmax)
    spec = select(Problem("quantize_nf4", w.device.type, w.dtype, N=w.numel(), blocksize=blocksize))
    both = kernels_of(spec.backend).get("quantize_nf4_double")
    if both is None:
        packed, absmax = spec.run(contiguous("quantize_nf4", w), blocksize=blocksize)
        return packed, absmax, *quantize_absmax_impl(absmax)
    result: BothLevels = both.run(contiguous("quantize_nf4", w), blocksize=blocksize)
    return result


@fake("qlora_kernels::quantize_nf4_double")
def quantize_nf4_double_fake(w: Tensor, *, blocksize: int) -> BothLevels:
    """Return empty tensors with the shapes and dtypes of the result."""
    packed, absmax = quantize_nf4_fake(w, blocksize=blocksize)
    return packed, absmax, *quantize_absmax_fake(absmax)


for _name in ("quantize_nf4", "quantize_absmax", "quantize_nf4_double"):
    refuse_derivatives(f"qlora_kernels::{_name}")


def _check_absmax(absmax: Tensor) -> None:
    check_given("quantize_absmax", "absmax", absmax)
    if absmax.dtype != torch.float32:
        raise TypeError(f"quantize_absmax: absmax must be torch.float32, got {absmax.dtype}")
    if absmax.dim() != 1:
        raise ValueError(f"quantize_absmax: absmax must have one dimension, got shape {tuple(absmax.shape)}")
