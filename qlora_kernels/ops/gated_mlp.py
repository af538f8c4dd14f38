"""gated_mlp: down(f(gate(x)) * up(x)) with three linears over NF4, with LoRA or without, as one autograd node.

The node runs the kernels of linear_nf4_lora, linear_nf4_lora_group and glu (lora_projection.py). It saves what these
ops save: x, gate(x), up(x), the product h, and the s of each linear. Derivatives of higher order run on the ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._linear import flatten_to_2d, restore_leading_dims
from .dispatch_fast_path import below_autograd, is_plain_call
from .glu import ACTIVATIONS, glu
from .lora_projection import Projection, SharedInput, gradients_by_ops, run_as_one_node, wanted, with_seeds
from .registry import Problem, select


class GatedMLP(NamedTuple):
    """The projections of a gated MLP: gate and up [N, K], down [K', N].   activation: one of glu's."""

    gate: Projection
    up: Projection
    down: Projection
    activation: str

    def with_factors(self, factors: tuple[Tensor | None, ...]) -> GatedMLP:
        """Return this MLP with the factors of gate, up and down as autograd passes or saved them."""
        gate_A, gate_B, up_A, up_B, down_A, down_B = factors
        gate, up = self.gate.with_factors(gate_A, gate_B), self.up.with_factors(up_A, up_B)
        return GatedMLP(gate, up, self.down.with_factors(down_A, down_B), self.activation)


def gated_mlp(x: Tensor, mlp: GatedMLP) -> Tensor:
    """Compute down(f(gate(x)) * up(x)).

    x: [..., K], fp32, bf16 or fp16.
    Returns y [..., K'] of x's dtype. Differentiable in x and the LoRA factors, to any order.
    Raises ValueError or TypeError as the ops linear_nf4, linear_nf4_lora and glu do.
    """
    gate, up, down = with_seeds(mlp[:3], x.device)
    mlp = GatedMLP(gate, up, down, mlp.activation)
    factors = (*gate.factors, *up.factors, *down.factors)
    adapted = gate.lora is not None or up.lora is not None  # otherwise the ops need not save x
    fits = adapted and x.dim() >= 2 and x.shape[-1] == gate.weight.K == up.weight.K and mlp.activation in ACTIVATIONS
    if not fits or gate.weight.N != up.weight.N or down.weight.K != up.weight.N or not run_as_one_node(x, mlp[:3]):
        return _by_ops(x, mlp, *factors)
    y: Tensor = GatedMLPFunction.apply(x, mlp, *factors)  # type: ignore[no-untyped-call]
    return y


def _by_ops(x: Tensor, mlp: GatedMLP, *factors: Tensor | None) -> Tensor:
    mlp = mlp.with_factors(factors)
    gate, up = SharedInput(mlp[:2], x).by_op(x)
    return mlp.down.by_op(glu(gate, up, mlp.activation))


class GatedMLPFunction(torch.autograd.Function):
    """The y of gated_mlp and its gradients with respect to x and the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: GatedMLP, *factors: Tensor | None) -> Tensor:
        """Return y, and save what the ops would save."""
        with below_autograd():
            rows = flatten_to_2d(x)
            (gate, up), of_x = SharedInput(mlp[:2], rows).forward(rows)
            h = select(Problem("glu", gate.device.type, gate.dtype)).run(gate, up, mlp.activation)
            y, of_h = mlp.down.forward(h)
            ctx.save_for_backward(x, gate, up, None if of_h is None else h, of_h, *of_x, *factors)
            ctx.mlp = mlp
            return restore_leading_dims(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, mlp, *factors)."""
        x, gate, up, h, of_h, *rest = ctx.saved_tensors
        of_x, factors = rest[:-6], rest[-6:]
        mlp, need_grad_x = ctx.mlp, ctx.needs_input_grad[0]
        if torch.is_grad_enabled() or not is_plain_call(grad_y):
            return gradients_by_ops(lambda *inputs: _by_ops(inputs[0], mlp, *inputs[1:]), ctx, grad_y, x, *factors)
        mlp = mlp.with_factors(factors)
        with below_autograd():
            grad_h, *grads_down = mlp.down.backward(flatten_to_2d(grad_y), h, of_h)
            run = select(Problem("glu_backward", gate.device.type, gate.dtype)).run
            grads = run(grad_h, gate, up, mlp.activation)
            del grad_h
            rows = flatten_to_2d(x)
            grad_x, of_factors = SharedInput(mlp[:2], rows).backward(grads, rows, of_x, need_grad_x=need_grad_x)
            grad_x = None if grad_x is None else restore_leading_dims(grad_x, x)
        return grad_x, None, *wanted([*of_factors, *grads_down], ctx.needs_input_grad[2:])
