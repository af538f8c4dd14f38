"""gated_mlp: down(f(gate(x)) * up(x)) with three LoRA linears over NF4, as one autograd node.

The node runs the kernels of linear_nf4_lora and glu (lora_projection.py). It saves what these ops save: x, gate(x),
up(x), the product h, and the s of each linear. Derivatives of higher order run on the ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._linear import flatten_to_2d, restore_leading_dims
from .dispatch_fast_path import below_autograd, is_plain_call
from .glu import ACTIVATIONS, glu
from .lora_projection import Projection, gradients_by_ops, run_as_one_node, wanted
from .registry import Problem, select


class GatedMLP(NamedTuple):
    """The projections of a gated MLP: gate and up [N, K], down [K', N].   activation: one of glu's."""

    gate: Projection
    up: Projection
    down: Projection
    activation: str


def gated_mlp(x: Tensor, mlp: GatedMLP) -> Tensor:
    """Compute down(f(gate(x)) * up(x)).

    x: [..., K], fp32, bf16 or fp16.
    Returns y [..., K'] of x's dtype. Differentiable in x and the LoRA factors, to any order.
    Raises ValueError or TypeError as the ops linear_nf4_lora and glu do.
    """
    gate, up, down, activation = mlp
    factors = (gate.lora.A, gate.lora.B, up.lora.A, up.lora.B, down.lora.A, down.lora.B)
    fits = x.dim() >= 2 and x.shape[-1] == gate.weight.K == up.weight.K and activation in ACTIVATIONS
    if not fits or gate.weight.N != up.weight.N or down.weight.K != up.weight.N or not run_as_one_node(x, mlp[:3]):
        return _by_ops(x, mlp, *factors)
    y: Tensor = GatedMLPFunction.apply(x, mlp, *factors)  # type: ignore[no-untyped-call]
    return y


def _by_ops(x: Tensor, mlp: GatedMLP, *factors: Tensor) -> Tensor:
    gate_A, gate_B, up_A, up_B, down_A, down_B = factors
    h = glu(mlp.gate.by_op(x, gate_A, gate_B), mlp.up.by_op(x, up_A, up_B), mlp.activation)
    return mlp.down.by_op(h, down_A, down_B)


class GatedMLPFunction(torch.autograd.Function):
    """The y of gated_mlp and its gradients with respect to x and the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: GatedMLP, *factors: Tensor) -> Tensor:
        """Return y, and save what the ops would save."""
        with below_autograd():
            rows = flatten_to_2d(x)
            gate, gate_s = mlp.gate.forward(rows)
            up, up_s = mlp.up.forward(rows)
            h = select(Problem("glu", gate.device.type, gate.dtype)).run(gate, up, mlp.activation)
            y, down_s = mlp.down.forward(h)
            ctx.save_for_backward(x, gate, up, h, gate_s, up_s, down_s, *factors)
            ctx.mlp = mlp
            return restore_leading_dims(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, mlp, *factors)."""
        x, gate, up, h, gate_s, up_s, down_s, *factors = ctx.saved_tensors
        mlp, need_grad_x = ctx.mlp, ctx.needs_input_grad[0]
        if torch.is_grad_enabled() or not is_plain_call(grad_y):
            return gradients_by_ops(lambda *inputs: _by_ops(inputs[0], mlp, *inputs[1:]), ctx, grad_y, x, *factors)
        gate_A, gate_B, up_A, up_B, down_A, down_B = factors
        with below_autograd():
            rows = flatten_to_2d(x)
            grad_h, *grads_down = mlp.down.backward(flatten_to_2d(grad_y), h, down_s, down_A, down_B)
            run = select(Problem("glu_backward", gate.device.type, gate.dtype)).run
            grad_gate, grad_up = run(grad_h, gate, up, mlp.activation)
            del grad_h
            of_up, *grads_up = mlp.up.backward(grad_up, rows, up_s, up_A, up_B, need_grad_x=need_grad_x)
            of_gate, *grads_gate = mlp.gate.backward(grad_gate, rows, gate_s, gate_A, gate_B, need_grad_x=need_grad_x)
            grad_x = restore_leading_dims(of_up.add_(of_gate), x) if need_grad_x else None
        return grad_x, None, *wanted([*grads_gate, *grads_up, *grads_down], ctx.needs_input_grad[2:])
