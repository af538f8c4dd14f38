"""gated_mlp: down(f(gate(x)) * up(x)) with three linears over NF4, with LoRA or without, as one autograd node, and with
a norm x + down(f(gate(n)) * up(n)), n = norm(x).

The node runs the kernels of rms_norm, linear_nf4_lora, linear_nf4_lora_group and glu (lora_projection.py), in one call
where the backend has the kernel gated_mlp. It saves what these ops save: x, n, gate(n), up(n), the product h, and the s
of each linear. Derivatives of higher order run on the ops.

Kernel contract, x [M, K] contiguous, without dropout:
    gated_mlp            run(x, mlp) -> (y [M, K'], GatedMLPState)
    gated_mlp_backward   run(grad_y, x, mlp, state, needs) -> (grad_x or None, grad of the norm's weight or None,
                         [grad_A, grad_B of gate, up and down, or None])
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._linear import flatten_to_2d, restore_leading_dims
from .dispatch_fast_path import below_autograd, is_plain_call
from .glu import ACTIVATIONS, glu
from .lora_projection import Projection, SharedInput, run_as_one_node, wanted, with_seeds
from .operands import Needs
from .registry import Problem, select
from .residual_block import BlockNorm, NodeNeeds, by_ops, gradients_by_ops, kernel_of, normalized, normalized_backward


class GatedMLP(NamedTuple):
    """The projections of a gated MLP: gate and up [N, K], down [K', N].

    activation: one of glu's.   norm: of the input, to which the result is added, or None for neither.
    """

    gate: Projection
    up: Projection
    down: Projection
    activation: str
    norm: BlockNorm | None = None

    def with_tensors(self, norm_weight: Tensor | None, factors: tuple[Tensor | None, ...]) -> GatedMLP:
        """Return this MLP with the norm's weight and the factors of gate, up and down as autograd has them."""
        gate, up, down = (each.with_factors(*factors[2 * i : 2 * i + 2]) for i, each in enumerate(self[:3]))
        norm = None if self.norm is None or norm_weight is None else self.norm._replace(weight=norm_weight)
        return GatedMLP(gate, up, down, self.activation, norm)


class GatedMLPState(NamedTuple):
    """What the backward pass needs in addition to x and the parameters.

    n, scale: norm(x) and its scale, or None.   h: f(gate) * up, or None if down has no adapter.   s_h: of down.
    of_input: what SharedInput saves for gate and up.
    """

    n: Tensor | None
    scale: Tensor | None
    gate: Tensor
    up: Tensor
    h: Tensor | None
    s_h: Tensor | None
    of_input: tuple[Tensor | None, ...]


def gated_mlp(x: Tensor, mlp: GatedMLP) -> Tensor:
    """Compute down(f(gate(x)) * up(x)), or x + down(f(gate(n)) * up(n)) with n = norm(x).

    x: [..., K], fp32, bf16 or fp16.
    Returns y [..., K'] of x's dtype. Differentiable in x, the norm's weight and the LoRA factors, to any order.
    Raises ValueError or TypeError as the ops rms_norm, linear_nf4, linear_nf4_lora and glu do.
    """
    gate, up, down = with_seeds(mlp[:3], x.device)
    mlp = GatedMLP(gate, up, down, mlp.activation, mlp.norm)
    norm_weight, factors = None if mlp.norm is None else mlp.norm.weight, (*gate.factors, *up.factors, *down.factors)
    if not _fits(x, mlp) or not run_as_one_node(x, mlp[:3]):
        return _by_ops(mlp, x, norm_weight, *factors)
    y: Tensor = GatedMLPFunction.apply(mlp, x, norm_weight, *factors)  # type: ignore[no-untyped-call]
    return y


def _fits(x: Tensor, mlp: GatedMLP) -> bool:
    if mlp.gate.lora is None and mlp.up.lora is None:  # the ops need not save x
        return False
    gate, up, down = mlp.gate.weight, mlp.up.weight, mlp.down.weight
    if x.dim() < 2 or not x.shape[-1] == gate.K == up.K or not gate.N == up.N == down.K:
        return False
    return mlp.activation in ACTIVATIONS and (mlp.norm is None or (mlp.norm.fits(x) and down.N == gate.K))


def _by_ops(mlp: GatedMLP, x: Tensor, norm_weight: Tensor | None, *factors: Tensor | None) -> Tensor:
    mlp = mlp.with_tensors(norm_weight, factors)

    def block(n: Tensor) -> Tensor:
        gate, up = SharedInput(mlp[:2], n).by_op(n)
        return mlp.down.by_op(glu(gate, up, mlp.activation))

    return by_ops(x, mlp.norm, block)


class GatedMLPFunction(torch.autograd.Function):
    """The y of gated_mlp and its gradients with respect to x, the norm's weight and the factors."""

    @staticmethod
    def forward(ctx: Any, mlp: GatedMLP, x: Tensor, norm_weight: Tensor | None, *factors: Tensor | None) -> Tensor:
        """Return y, and save what the ops would save."""
        with below_autograd():
            rows = flatten_to_2d(x)
            ctx.is_one_kernel = (kernel := kernel_of("gated_mlp", x, mlp[:3])) is not None
            y, state = _forward(rows, mlp) if kernel is None else kernel.run(rows, mlp)
            ctx.save_for_backward(x, norm_weight, *factors, *state[:-1], *state.of_input)
            ctx.mlp = mlp
            return restore_leading_dims(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (mlp, x, norm_weight, *factors)."""
        x, norm_weight, *rest = ctx.saved_tensors
        factors, state = tuple(rest[:6]), GatedMLPState._make((*rest[6:12], tuple(rest[12:])))
        mlp = ctx.mlp
        if torch.is_grad_enabled() or not is_plain_call(grad_y):
            return gradients_by_ops(lambda *inputs: _by_ops(mlp, *inputs), ctx, grad_y, x, norm_weight, *factors)
        mlp, needs = mlp.with_tensors(norm_weight, factors), NodeNeeds.of(ctx)
        with below_autograd():
            kernel = kernel_of("gated_mlp_backward", x, mlp[:3]) if ctx.is_one_kernel else None
            run = _backward if kernel is None else kernel.run
            grad_x, grad_weight, grads = run(flatten_to_2d(grad_y), flatten_to_2d(x), mlp, state, needs)
            grad_x = None if grad_x is None else restore_leading_dims(grad_x, x)
        return None, grad_x, grad_weight, *wanted(grads, needs.factors)


def _forward(rows: Tensor, mlp: GatedMLP) -> tuple[Tensor, GatedMLPState]:
    """Run the kernel gated_mlp as the kernels of its ops."""
    n, scale = normalized(rows, mlp.norm)
    (gate, up), of_input = SharedInput(mlp[:2], n).forward(n)
    h = select(Problem("glu", gate.device.type, gate.dtype)).run(gate, up, mlp.activation)
    y, s_h = mlp.down.forward(h)
    saved_n = None if mlp.norm is None else n
    state = GatedMLPState(saved_n, scale, gate, up, None if s_h is None else h, s_h, tuple(of_input))
    return y if mlp.norm is None else y.add_(rows), state


def _backward(
    grad_y: Tensor, rows: Tensor, mlp: GatedMLP, state: GatedMLPState, needs: NodeNeeds
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Run the kernel gated_mlp_backward as the kernels of its ops."""
    n = rows if state.n is None else state.n
    grad_h, *grads_down = mlp.down.backward(grad_y, state.h, state.s_h, Needs(True, *needs.factors[4:]))
    run = select(Problem("glu_backward", n.device.type, n.dtype)).run
    grads = run(grad_h, state.gate, state.up, mlp.activation)
    del grad_h
    need_input = needs.x or needs.norm_weight
    grad_n, of_factors = SharedInput(mlp[:2], n).backward(
        grads, n, state.of_input, need_grad_x=need_input, need_factors=needs.factors[:4]
    )
    grad_x, grad_weight = normalized_backward(grad_n, grad_y, rows, mlp.norm, state.scale, needs)
    return grad_x, grad_weight, [*of_factors, *grads_down]
