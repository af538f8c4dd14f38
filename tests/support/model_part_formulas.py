"""The formulas of rms_norm, rope and glu in float64, with bounds on the errors of their kernels (tolerances.py).

u is fp32's unit roundoff. All kernels compute in fp32 and round each result once; rms_norm with weight_offset 0 also
rounds the normalized row to x's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.tolerances import Expected, gamma, unit_roundoff

U = unit_roundoff(torch.float32)


class Normalized(NamedTuple):
    """n = s / rms(s), a bound on the relative error of a computed n, and 1 / rms(s)."""

    n: Tensor
    relative: float
    scale: Tensor


def normalized(s: Tensor, eps: float) -> Normalized:
    """Return s / rms(s): the error is gamma(C) of the sum of squares, half of it after the root, and four more
    steps."""
    wide = s.detach().double()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return Normalized(wide * scale, gamma(s.shape[-1], torch.float32) + 6 * U, scale)


def rms_norm(s: Tensor, weight: Tensor, eps: float, offset: float) -> Expected:
    """Return y for s = x + residual after rounding."""
    n, relative, _ = normalized(s, eps)
    rounded = Expected(n, relative * n.abs())
    if offset == 0.0 and s.dtype != torch.float32:
        rounded = rounded.to(s.dtype)
    factor = weight.detach().double() + offset
    y = Expected(rounded.value * factor, rounded.error * factor.abs() + 3 * U * (rounded.magnitude * factor.abs()))
    return y.to(s.dtype if offset else torch.promote_types(s.dtype, weight.dtype))


def rms_norm_gradients(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Expected, Expected]:
    """Return (grad_x, grad_weight)."""
    n, relative, scale = normalized(s, eps)
    grad = grad_y.double()
    g = grad * (weight.detach().double() + offset)
    mean = (g * n).mean(-1, keepdim=True)
    terms = (g * n).abs().mean(-1, keepdim=True)
    mean_error = (gamma(s.shape[-1], torch.float32) + relative + 4 * U) * terms
    inner = g - n * mean
    inner_error = 4 * U * (g.abs() + (n * mean).abs()) + n.abs() * mean_error + relative * (n * mean).abs()
    value, error = scale * inner, scale * (inner_error + (relative + 2 * U) * inner.abs())
    if grad_s is not None:
        value = value + grad_s.double()
        error = error + 2 * U * (value.abs() + grad_s.double().abs())
    flat, rows = (grad * n).flatten(0, -2), s.shape[:-1].numel()
    sum_error = (gamma(rows, torch.float32) + relative + 2 * U) * flat.abs().sum(0)
    return Expected(value, error).to(s.dtype), Expected(flat.sum(0), sum_error).to(weight.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Expected:
    """Return x [B, heads, T, D] rotated; cos and sin [B or 1, T, D]."""
    wide, c, s = x.detach().double(), cos.double()[:, None], sin.double()[:, None]
    if inverse:
        a, b = (wide * s).chunk(2, dim=-1)
        turned = torch.cat([b, -a], dim=-1)
    else:
        a, b = wide.chunk(2, dim=-1)
        turned = torch.cat([-b, a], dim=-1) * s
    return Expected(wide * c + turned, 3 * U * ((wide * c).abs() + turned.abs())).to(x.dtype)


class Activated(NamedTuple):
    """f(g) and f'(g), with bounds on their errors."""

    value: Tensor
    error: Tensor
    slope: Tensor
    slope_error: Tensor


def activated(gate: Tensor, activation: str) -> Activated:
    """Return f = g * sigmoid(a); an error of 4 u |a| in the argument changes the sigmoid by sigmoid' times that."""
    g = gate.detach().double()
    if activation == "silu":
        a, inner = g, torch.ones_like(g)
    else:
        root = 2 * (2 / torch.pi) ** 0.5
        a, inner = root * (g + 0.044715 * g**3), root * (1 + 3 * 0.044715 * g.square())
    sigmoid = torch.sigmoid(a)
    bend = sigmoid * (1 - sigmoid)
    off = 8 * U * (1 + a.abs() * bend)
    slope_off = off + (g * inner).abs() * 16 * U * (1 + a.abs()) * bend.clamp_min(U)
    return Activated(g * sigmoid, g.abs() * off, sigmoid + g * inner * bend, slope_off)


def glu(gate: Tensor, up: Tensor, activation: str) -> Expected:
    """Return f(gate) * up."""
    f, other = activated(gate, activation), up.detach().double()
    value = f.value * other
    return Expected(value, f.error * other.abs() + 2 * U * value.abs()).to(gate.dtype)


def glu_gradients(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Expected, Expected]:
    """Return (grad_gate, grad_up)."""
    f, grad = activated(gate, activation), grad_y.double()
    through = grad * up.detach().double()
    of_gate, of_up = through * f.slope, grad * f.value
    gate_error = through.abs() * f.slope_error + 3 * U * of_gate.abs()
    up_error = grad.abs() * f.error + 2 * U * of_up.abs()
    return Expected(of_gate, gate_error).to(gate.dtype), Expected(of_up, up_error).to(gate.dtype)
