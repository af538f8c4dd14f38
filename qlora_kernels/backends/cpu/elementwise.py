"""rms_norm, rope and glu in the native library."""

from __future__ import annotations

import torch
from torch import Tensor

_C = torch.ops.qlora_kernels_C


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, s or empty, scale)."""
    results: tuple[Tensor, Tensor, Tensor] = _C.cpu_rms_norm(x, residual, weight, eps, weight_offset)
    return results


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
    """Return (grad_x, grad_weight or empty); the library computes the weight's gradient in fp32."""
    grad_x, grad_weight = _C.cpu_rms_norm_backward(grad_y, grad_s, s, weight, scale, weight_offset, need_grad_weight)
    return grad_x, grad_weight.to(weight.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return (rotated q, rotated k), with the memory layout of q and k."""
    rotated_q, rotated_k = torch.empty_like(q), torch.empty_like(k)
    _C.cpu_rope(q, rotated_q, k, rotated_k, cos, sin, inverse)
    return rotated_q, rotated_k


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up, of gate's shape and dtype."""
    y: Tensor = _C.cpu_glu(gate, up, activation)
    return y


def glu_backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return grad_gate and grad_up for grad_y."""
    grads: tuple[Tensor, Tensor] = _C.cpu_glu_backward(grad_y, gate, up, activation)
    return grads
