"""linear_nf4 and linear_nf4_grad_x as dequantize, then matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import reference
from ...format.quant_state import first_level


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
    """y = x W^T + bias."""
    scales = first_level(absmax, absmax_q, absmax_scale, absmax_offset)
    shape = torch.Size((out_features, x.shape[1]))
    w = reference.dequantize_nf4(packed, scales, blocksize, shape, x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


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
    """grad_x = grad_y W."""
    scales = first_level(absmax, absmax_q, absmax_scale, absmax_offset)
    shape = torch.Size((grad_y.shape[1], in_features))
    return grad_y @ reference.dequantize_nf4(packed, scales, blocksize, shape, grad_y.dtype)
