"""dequantize_nf4: weights from packed indices and constants.

Ops: qlora_kernels::dequantize_nf4 and its out variant.

Kernel contract:
    run(weight, *, out) -> None     weight: Weight with N * K = out.numel() >= 1 for any N and K; out contiguous
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from ._implement import fake, implement, refuse_derivatives
from .checks import check_float, check_given, check_weight
from .operands import Weight
from .registry import Problem, select
from .tensor_memory import contiguous

_TAKES = (Weight,)
torch.library.define("qlora_kernels::dequantize_nf4", f"({Weight.schema()}, *, ScalarType dtype) -> Tensor")
torch.library.define("qlora_kernels::dequantize_nf4.out", f"({Weight.schema()}, *, Tensor(a!) out) -> ()")


def dequantize_nf4(
    packed: Tensor, state: QuantState, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute w[i] = code[q[i]] * absmax[i // blocksize] in fp32, rounded once, as a tensor of state.shape.

    packed: uint8 with (numel + 1) // 2 elements, element 2i in the high nibble.   state: from `quantize_nf4`.
    dtype: fp32, bf16 or fp16; defaults to the source weight's, or to out's.
    out: written and returned if given; shape state.shape, contiguous, on packed's device, any of the three dtypes.
    All backends agree bit for bit (tests/ops/test_dequantize_nf4.py).
    Raises ValueError or TypeError, naming the argument, if these are not consistent.
    Source: QLoRA (arXiv:2305.14314) section 3.
    """
    weight = Weight(packed, *state.constants, state.blocksize, 1, state.numel)
    if out is None:
        flat: Tensor = torch.ops.qlora_kernels.dequantize_nf4.default(*weight, dtype=dtype or state.dtype)
        return flat.view(state.shape)
    if out.shape != state.shape:
        raise ValueError(f"dequantize_nf4: out must have shape {tuple(state.shape)}, got {tuple(out.shape)}")
    if dtype is not None and dtype != out.dtype:
        raise TypeError(f"dequantize_nf4: dtype must equal out's {out.dtype} or be None, got {dtype}")
    torch.ops.qlora_kernels.dequantize_nf4.out(*weight, out=out)
    return out


@implement("qlora_kernels::dequantize_nf4", _TAKES)
def dequantize_nf4_impl(weight: Weight, *, dtype: torch.dtype) -> Tensor:
    """Return a new [N, K] tensor, filled by the out variant."""
    check_given("dequantize_nf4", "packed", weight.packed)
    out = weight.packed.new_empty((weight.N, weight.K), dtype=dtype)
    dequantize_nf4_out_impl(weight, out=out)
    return out


@implement("qlora_kernels::dequantize_nf4.out", _TAKES)
def dequantize_nf4_out_impl(weight: Weight, *, out: Tensor) -> None:
    """Check the arguments, then run the selected kernel."""
    dequantize_nf4_out_fake(weight, out=out)
    if out.numel() == 0:
        return
    problem = Problem(
        "dequantize_nf4",
        out.device.type,
        out.dtype,
        N=out.numel(),
        blocksize=weight.blocksize,
        double_quant=weight.double_quant,
    )
    if not weight.packed.is_contiguous():
        weight = weight._replace(packed=contiguous("dequantize_nf4", weight.packed))
    select(problem).run(weight, out=out)


@fake("qlora_kernels::dequantize_nf4", _TAKES)
def dequantize_nf4_fake(weight: Weight, *, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor with the shape and dtype of the result."""
    check_given("dequantize_nf4", "packed", weight.packed)
    out = weight.packed.new_empty((weight.N, weight.K), dtype=dtype)
    dequantize_nf4_out_fake(weight, out=out)
    return out


@fake("qlora_kernels::dequantize_nf4.out", _TAKES)
def dequantize_nf4_out_fake(weight: Weight, *, out: Tensor) -> None:
    """Check the arguments; nothing is computed.

    Raises ValueError if `out` is not contiguous or has another number of elements than the weight, and TypeError if it
    is not a float tensor.
    """
    check_float("dequantize_nf4", "dtype of the result", out)
    if not out.is_contiguous():
        raise ValueError(f"dequantize_nf4: out must be contiguous, got strides {out.stride()}")
    if out.numel() != weight.N * weight.K:
        raise ValueError(f"dequantize_nf4: out must have {weight.N * weight.K} elements, got {out.numel()}")
    check_weight("dequantize_nf4", weight, out.device)


refuse_derivatives("qlora_kernels::dequantize_nf4")
refuse_derivatives("qlora_kernels::dequantize_nf4.out")
