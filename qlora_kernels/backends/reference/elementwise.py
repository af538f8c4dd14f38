"""rms_norm, rope and glu composed of torch's ops: the formulas of ops/compose.py, computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import compose


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, s or empty, scale)."""
    return compose.rms_norm(x, residual, weight, eps, weight_offset)


def rms_norm_backward(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_offset: float,
    *,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (grad_x, grad_weight); grad_weight is empty if it is not needed."""
    n, grad = s.float() * scale[:, None], grad_y.float()
    g = grad * (weight.float() + weight_offset)
    grad_x = scale[:, None] * (g - n * (g * n).mean(-1, keepdim=True))
    grad_x = grad_x if grad_s is None else grad_x + grad_s.float()
    grad_weight = (grad * n).sum(0).to(weight.dtype) if need_grad_weight else weight.new_empty(0)
    return grad_x.to(s.dtype), grad_weight


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by the angles of their positions."""
    rotated = compose.rope(q, k, cos, sin, inverse)
    return torch.empty_like(q).copy_(rotated[0]), torch.empty_like(k).copy_(rotated[1])


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up in gate's dtype."""
    return compose.glu(gate, up, activation)


def glu_backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    return compose.glu_backward(grad_y, gate, up, activation)
