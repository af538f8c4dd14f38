"""glu: the gated product of an MLP, activation(gate) * up.

Ops: qlora_kernels::glu (differentiable in gate and up) and qlora_kernels::glu_backward.

    y = f(gate) * up                          f = silu:       g * sigmoid(g)
    grad_gate = grad_y * up * f'(gate)        f = gelu_tanh:  g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3)))
    grad_up   = grad_y * f(gate)

in fp32, each result rounded once. Only gate and up are saved for backward, which recomputes f(gate).

Kernel contract: gate, up and grad_y contiguous, of one shape and dtype, numel >= 1; activation one of ACTIVATIONS.
    glu           run(gate, up, activation) -> y
    glu_backward  run(grad_y, gate, up, activation) -> (grad_gate, grad_up)
Source: GLU Variants Improve Transformer (arXiv:2002.05202) equation 5; GELUs (arXiv:1606.08415) section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compose
from ._implement import compose_derivatives, differentiate, fake, implement
from .checks import check_float, check_like
from .registry import Problem, select
from .tensor_memory import contiguous

ACTIVATIONS = ("silu", "gelu_tanh")
"""silu gives SwiGLU (Llama, Qwen, Mistral), gelu_tanh gives GeGLU (Gemma)."""

torch.library.define("qlora_kernels::glu", "(Tensor gate, Tensor up, str activation) -> Tensor")
torch.library.define(
    "qlora_kernels::glu_backward", "(Tensor grad_y, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)"
)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute y = activation(gate) * up, without the activation in memory.

    gate, up: one shape and dtype, fp32, bf16 or fp16, any strides.   activation: "silu" or "gelu_tanh".
    Returns y, contiguous, of the same shape and dtype. Differentiable in gate and up.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    """
    y: Tensor = torch.ops.qlora_kernels.glu.default(gate, up, activation)
    return y


@implement("qlora_kernels::glu")
def glu_impl(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Check the arguments, then run the selected kernel."""
    _check("glu", gate, up, activation)
    if gate.numel() == 0:
        return gate.new_empty(gate.shape)
    run = select(Problem("glu", gate.device.type, gate.dtype)).run
    y: Tensor = run(contiguous("glu", gate), contiguous("glu", up), activation)
    return y


@fake("qlora_kernels::glu")
def glu_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return an empty tensor with the shape and dtype of y."""
    _check("glu", gate, up, activation)
    return gate.new_empty(gate.shape)


@implement("qlora_kernels::glu_backward")
def glu_backward_impl(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Check the arguments, then run the selected kernel."""
    _check_backward(grad_y, gate, up, activation)
    if gate.numel() == 0:
        return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    run = select(Problem("glu_backward", gate.device.type, gate.dtype)).run
    grads: tuple[Tensor, Tensor] = run(*(contiguous("glu_backward", t) for t in (grad_y, gate, up)), activation)
    return grads


@fake("qlora_kernels::glu_backward")
def glu_backward_fake(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of the gradients."""
    _check_backward(grad_y, gate, up, activation)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


class GLUFunction(torch.autograd.Function):
    """The y of glu and its gradients with respect to gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, run: Callable[..., Any]) -> Tensor:
        """Return y, and save gate and up for backward."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        y: Tensor = run(gate, up, activation)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of (gate, up, activation, run)."""
        grad_gate, grad_up = torch.ops.qlora_kernels.glu_backward.default(grad_y, *ctx.saved_tensors, ctx.activation)
        return grad_gate, grad_up, None, None


def glu_composed(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Check the arguments, then compose glu of torch's ops."""
    _check("glu", gate, up, activation)
    return compose.glu(gate, up, activation)


def glu_backward_composed(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Check the arguments, then compose glu_backward of torch's ops."""
    _check_backward(grad_y, gate, up, activation)
    return compose.glu_backward(grad_y, gate, up, activation)


differentiate("qlora_kernels::glu", (), GLUFunction.apply, compose=glu_composed)
compose_derivatives("qlora_kernels::glu_backward", (), glu_backward_composed)


def _check(op: str, gate: Tensor, up: Tensor, activation: str) -> None:
    check_float(op, "gate", gate)
    check_like(op, "up", up, "gate", gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")


def _check_backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    _check("glu_backward", gate, up, activation)
    check_like("glu_backward", "grad_y", grad_y, "gate", gate)
