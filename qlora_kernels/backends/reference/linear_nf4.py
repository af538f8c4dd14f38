"""linear_nf4 and linear_nf4_grad_x: dequantization followed by a matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.operands import Weight
from .codec import dequantize_nf4


def linear_nf4(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return y = x W^T + bias."""
    return torch.nn.functional.linear(x, dense(weight, x), None if bias is None else bias.to(x.dtype))


def linear_nf4_grad_x(grad_y: Tensor, weight: Weight) -> Tensor:
    """Return grad_x [M, K] = grad_y W in grad_y's dtype."""
    return grad_y @ dense(weight, grad_y)


def dense(weight: Weight, like: Tensor) -> Tensor:
    """Return W [N, K] in like's dtype."""
    w = like.new_empty(weight.N, weight.K)
    dequantize_nf4(weight, out=w)
    return w
