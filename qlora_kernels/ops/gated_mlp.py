"""gated_mlp: down(f(gate(x)) * up(x)) with three linears over NF4, with LoRA or without, as one autograd node, and with
a norm x + down(f(gate(n)) * up(n)), n = norm(x).

The node runs the kernels of rms_norm, linear_nf4_lora, linear_nf4_lora_group and glu (lora_projection.py), in one call
where the backend has the kernel gated_mlp. It saves what these ops save: x, n, gate(n), up(n), the product h, and the s
of each linear; n and h only where the gradient of a lora_A reads them. Derivatives of higher order run on the ops.

Kernel contract, x [M, K] contiguous, without dropout:
    gated_mlp            run(x, mlp) -> (y [M, K'], GatedMLPState)
    gated_mlp_backward   run(grad_y, x, mlp, state, needs) -> (grad_x or None, grad of the norm's weight or None,
                         [grad_A, grad_B of gate, up and down, or None])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .glu import ACTIVATIONS, glu
from .lora_projection import Projection, SharedInput
from .operands import Needs
from .registry import Problem, select
from .residual_block import (
    BlockFunction,
    BlockGradients,
    BlockNorm,
    NodeNeeds,
    apply_block,
    normalized,
    normalized_backward,
    ops_save_input,
)


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

    def kept(self, needs: NodeNeeds) -> GatedMLPState:
        """Return the state without n and h where no gradient of a lora_A reads them."""
        of_gate, _, of_up, _, of_down, _ = needs.factors
        return self._replace(n=self.n if of_gate or of_up else None, h=self.h if of_down else None)

    def complete(self, rows: Tensor) -> GatedMLPState:
        """Return the state with x in place of n, without a norm, and tensors of the same size for what was not kept."""
        return self._replace(n=rows if self.n is None else self.n, h=self.up if self.h is None else self.h)


class GatedMLP(NamedTuple):
    """The projections of a gated MLP: gate and up [N, K], down [K', N].

    activation: one of glu's.   norm: of the input, to which the result is added, or None for neither.
    """

    gate: Projection
    up: Projection
    down: Projection
    activation: str
    norm: BlockNorm | None = None

    @property
    def op(self) -> str:
        """The kernel of the whole block."""
        return "gated_mlp"

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The projections gate, up and down."""
        return self[:3]

    @property
    def state_type(self) -> type[GatedMLPState]:
        """The type of what backward needs."""
        return GatedMLPState

    def with_projections(self, projections: Sequence[Projection], norm: BlockNorm | None) -> GatedMLP:
        """Return this MLP with other projections and another norm."""
        gate, up, down = projections
        return GatedMLP(gate, up, down, self.activation, norm)

    def fits(self, x: Tensor) -> bool:
        """Whether the MLP of x can run as one node."""
        if not ops_save_input(self.projections[:2], self.norm):
            return False
        gate, up, down = (projection.weight for projection in self.projections)
        if x.dim() < 2 or not x.shape[-1] == gate.K == up.K or not gate.N == up.N == down.K:
            return False
        return self.activation in ACTIVATIONS and (self.norm is None or (self.norm.fits(x) and down.N == gate.K))

    def by_ops(self, n: Tensor) -> Tensor:
        """Compute down(f(gate(n)) * up(n)) from ops that are differentiable to any order."""
        gate, up = SharedInput(self[:2], n).by_op(n)
        return self.down.by_op(glu(gate, up, self.activation))

    def run(self, rows: Tensor) -> tuple[Tensor, GatedMLPState]:
        """Run the kernel gated_mlp as the kernels of its ops."""
        n, scale = normalized(rows, self.norm)
        (gate, up), of_input = SharedInput(self[:2], n).forward(n)
        h = select(Problem("glu", gate.device.type, gate.dtype)).run(gate, up, self.activation)
        y, s_h = self.down.forward(h)
        saved_n = None if self.norm is None else n
        state = GatedMLPState(saved_n, scale, gate, up, None if s_h is None else h, s_h, tuple(of_input))
        return y if self.norm is None else y.add_(rows), state

    def run_backward(self, grad_y: Tensor, rows: Tensor, state: GatedMLPState, needs: NodeNeeds) -> BlockGradients:
        """Run the kernel gated_mlp_backward as the kernels of its ops."""
        n, scale, gate, up, h, s_h, of_input = state
        assert n is not None
        grad_h, *grads_down = self.down.backward(grad_y, h, s_h, Needs(True, *needs.factors[4:]))
        run = select(Problem("glu_backward", rows.device.type, rows.dtype)).run
        grads = run(grad_h, gate, up, self.activation)
        del grad_h
        need_input = needs.x or needs.norm_weight
        grad_n, of_factors = SharedInput(self[:2], n).backward(
            grads, n, of_input, need_grad_x=need_input, need_factors=needs.factors[:4]
        )
        grad_x, grad_weight = normalized_backward(grad_n, grad_y, rows, self.norm, scale, needs)
        return grad_x, grad_weight, [*of_factors, *grads_down]


def gated_mlp(x: Tensor, mlp: GatedMLP) -> Tensor:
    """Compute down(f(gate(x)) * up(x)), or x + down(f(gate(n)) * up(n)) with n = norm(x).

    x: [..., K], fp32, bf16 or fp16.
    Returns y [..., K'] of x's dtype. Differentiable in x, the norm's weight and the LoRA factors, to any order.
    Raises ValueError or TypeError as the ops rms_norm, linear_nf4, linear_nf4_lora and glu do.
    """
    return apply_block(x, mlp, GatedMLPFunction)


class GatedMLPFunction(BlockFunction):
    """The y of gated_mlp and its gradients with respect to x, the norm's weight and the factors."""
