"""The ops' kernel contracts (ops/<op>.py) over the library's private ops qlora_kernels_C::cpu_*."""

from __future__ import annotations

import torch
from torch import Tensor

_C = torch.ops.qlora_kernels_C


def quantize_nf4(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed, absmax) of a contiguous w."""
    packed, absmax = _C.cpu_quantize_nf4(w, blocksize)
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(absmax_q, absmax_scale, absmax_offset); the mean is torch's, whose order of summation the format takes over."""
    offset = absmax.mean()
    absmax_q, absmax_scale = _C.cpu_quantize_absmax(absmax, offset)
    return absmax_q, absmax_scale, offset


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
    """Into a contiguous out."""
    _C.cpu_dequantize_nf4(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, out)


def linear_nf4(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    *,
    blocksize: int,
    out_features: int,
) -> Tensor:
    """y [M, N]."""
    bias = None if bias is None else bias.contiguous()
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    y: Tensor = _C.cpu_linear_nf4(x, packed, *constants, bias, blocksize, out_features)
    return y


def linear_nf4_grad_x(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """grad_x [M, K]."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    grad_x: Tensor = _C.cpu_linear_nf4_grad_x(grad_y, packed, *constants, blocksize, in_features)
    return grad_x


def linear_nf4_lora(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, r])."""
    bias = None if bias is None else bias.contiguous()
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    y, s = _C.cpu_linear_nf4_lora(
        x, packed, *constants, bias, lora_A, lora_B, seed, scaling, dropout_p, blocksize, out_features
    )
    return y, s


def linear_nf4_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    blocksize: int,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x [M, K] or empty, grad_A, grad_B); the library delivers fp32 factors' gradients."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    grad_x, grad_A, grad_B = _C.cpu_linear_nf4_lora_backward(
        grad_y, x, s, packed, *constants, lora_A, lora_B, seed, scaling, dropout_p, blocksize, need_grad_x
    )
    return grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
