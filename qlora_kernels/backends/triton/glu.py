"""glu and its gradients, elementwise in one pass; both activations are gate * sigmoid(u) (see csrc/cpu/glu.cpp)."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rounding import cdiv
from .launch import launchable

BLOCK = 1024
NUM_WARPS = 4

LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715 * 2 * math.sqrt(2 / math.pi))
CUBIC_SLOPE = tl.constexpr(3 * 0.044715 * 2 * math.sqrt(2 / math.pi))


@triton.jit
def sigmoid_argument(gate, GELU: tl.constexpr):
    """Return the argument u of the sigmoid, and du / dgate."""
    if GELU:
        # For larger magnitudes the sigmoid is 0 or 1, and much larger cubes would overflow.
        g = tl.minimum(tl.maximum(gate, -32.0), 32.0)
        square = g * g
        return g * (square * CUBIC + LINEAR), square * CUBIC_SLOPE + LINEAR
    else:
        return gate, tl.full(gate.shape, 1.0, tl.float32)


@launchable
@triton.jit
def glu_kernel(p_gate, p_up, p_y, numel, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Compute y = gate * sigmoid(u) * up, rounded once."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    gate = tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32)
    u, _ = sigmoid_argument(gate, GELU)
    y = gate * tl.sigmoid(u) * tl.load(p_up + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)


@launchable
@triton.jit
def glu_backward_kernel(p_grad_y, p_gate, p_up, p_grad_gate, p_grad_up, numel, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """grad_gate = grad_y * up * (sigmoid + gate sigmoid (1 - sigmoid) u'),  grad_up = grad_y * gate * sigmoid."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    gate = tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32)
    grad_y = tl.load(p_grad_y + o, mask=m, other=0.0).to(tl.float32)
    up = tl.load(p_up + o, mask=m, other=0.0).to(tl.float32)
    u, u_slope = sigmoid_argument(gate, GELU)
    sigmoid = tl.sigmoid(u)
    activated = gate * sigmoid
    slope = sigmoid + activated * tl.sigmoid(-u) * u_slope
    tl.store(p_grad_gate + o, (grad_y * up * slope).to(p_grad_gate.dtype.element_ty), mask=m)
    tl.store(p_grad_up + o, (grad_y * activated).to(p_grad_up.dtype.element_ty), mask=m)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up. See ops/glu.py for the contract."""
    y = torch.empty_like(gate)
    numel = gate.numel()
    glu_kernel[(cdiv(numel, BLOCK),)](
        gate, up, y, numel, GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return y


def glu_backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return (grad_gate, grad_up). See ops/glu.py for the contract."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(gate)
    numel = gate.numel()
    glu_backward_kernel[(cdiv(numel, BLOCK),)](
        grad_y, gate, up, grad_gate, grad_up, numel, GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return grad_gate, grad_up
