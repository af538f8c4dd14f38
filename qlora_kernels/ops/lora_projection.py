"""LoRA linears over NF4 as steps of a larger autograd node, and the conditions under which such nodes may run.

A transformer block consists of about thirteen ops. Each op costs a pass through torch's dispatcher, checks and a graph
node, in Python and on one thread. In a training step of SmolLM2-135M (1024 tokens, two cores) this is a tenth of the
time. gated_mlp.py and lora_attention.py therefore run the kernels of several ops in one torch.autograd.Function. The
kernels, their order and their results are those of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..format.quant_state import FLOAT_DTYPES
from ._linear import problem_of
from .dispatch_fast_path import is_plain_call
from .linear_nf4_lora import draw_seed
from .linear_nf4_lora_group import call_group, problem_of_group
from .operands import GroupLoRA, LoRA, Needs, Weight
from .registry import KernelSpec, select

Factors = tuple[Tensor | None, Tensor | None]
"""(lora_A, lora_B) of a projection, or two None."""


class Projection(NamedTuple):
    """A linear layer y = x W^T + bias + scaling * (dropout(x) A^T) B^T.   bias: [N], a constant, or None.

    lora: the adapter, or None; with dropout, its seed is drawn by `with_seeds`.
    """

    weight: Weight
    bias: Tensor | None
    lora: LoRA | None

    @property
    def factors(self) -> Factors:
        """The factors of the adapter, which autograd differentiates."""
        return (None, None) if self.lora is None else self.lora[:2]

    def with_factors(self, lora_A: Tensor | None, lora_B: Tensor | None) -> Projection:
        """Return this projection with the factors as autograd passes or saved them."""
        if self.lora is None or lora_A is None or lora_B is None:
            return self
        return self._replace(lora=self.lora._replace(A=lora_A, B=lora_B))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (y [M, N], s [M, r] or None) for a contiguous x [M, K]."""
        if self.lora is None:
            return select(problem_of("linear_nf4", x, self.weight)).run(x, self.weight, self.bias), None
        run = select(problem_of("linear_nf4_lora", x, self.weight, self.lora)).run
        y, s = run(x, self.weight, self.bias, self.lora)
        return y, s

    def backward(
        self, grad_y: Tensor, x: Tensor | None, s: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (grad_x [M, K] or None, grad_A, grad_B).   x: may be None without an adapter."""
        need_grad_x = needs.need_grad_x
        if self.lora is None or x is None:
            run = select(problem_of("linear_nf4_grad_x", grad_y, self.weight)).run
            return run(grad_y, self.weight) if need_grad_x else None, None, None
        run = select(problem_of("linear_nf4_lora_backward", x, self.weight, self.lora)).run
        grad_x, grad_A, grad_B = run(grad_y, x, s, self.weight, self.lora, needs)
        return grad_x if need_grad_x else None, grad_A, grad_B

    def by_op(self, x: Tensor) -> Tensor:
        """Return y [..., N] from the op, which is differentiable to any order."""
        y: Tensor
        if self.lora is None:
            y = torch.ops.qlora_kernels.linear_nf4.default(x, *self.weight, self.bias)
        else:
            y = torch.ops.qlora_kernels.linear_nf4_lora.default(x, *self.weight, self.bias, *self.lora)[0]
        return y


def with_seeds(projections: Sequence[Projection], device: torch.device) -> list[Projection]:
    """Return the projections with a new dropout seed for each that has dropout, drawn in their order."""
    return [
        each if each.lora is None or each.lora.dropout_p <= 0 else each._replace(lora=_seeded(each.lora, device))
        for each in projections
    ]


def _seeded(lora: LoRA, device: torch.device) -> LoRA:
    return lora._replace(seed=draw_seed(device))


class SharedInput:
    """Projections of the same x. They run in one kernel where `is_group`, otherwise one after the other."""

    def __init__(self, projections: Sequence[Projection], x: Tensor) -> None:
        self.projections = projections
        self.weights = [each.weight for each in projections]
        self.biases = [each.bias for each in projections]
        loras = [each.lora for each in projections]
        present = [lora for lora in loras if lora is not None]
        # A group has one dropout mask, but each layer draws its own; and the kernels of a GPU are chosen by shape.
        self.is_group = (
            x.is_cpu
            and bool(present)
            and all(lora.dropout_p <= 0 and lora.A.dtype == present[0].A.dtype for lora in present)
        )
        self.is_complete = len(present) == len(loras)
        if not self.is_group:
            return
        pairs = zip(loras, self.weights, strict=True)
        lora_B = [x.new_empty(weight.N, 0) if lora is None else lora.B for lora, weight in pairs]
        scalings = [0.0 if lora is None else lora.scaling for lora in loras]
        self.lora = GroupLoRA(torch.cat([lora.A for lora in present]), lora_B, None, scalings, 0.0)
        if not self.is_complete:  # ranks of 0, which only the native library takes
            self.is_group = self._kernel("linear_nf4_lora_group", x).backend == "cpu"

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return (y of each projection, what backward needs in addition to x and the factors)."""
        if not self.is_group:
            pairs = [each.forward(x) for each in self.projections]
            return [y for y, _ in pairs], [s for _, s in pairs]
        ys, s = self._kernel("linear_nf4_lora_group", x).run(x, self.weights, self.biases, self.lora)
        return ys, [s]

    def backward(
        self,
        grad_ys: Sequence[Tensor],
        x: Tensor,
        saved: Sequence[Tensor | None],
        *,
        need_grad_x: bool,
        need_factors: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return (the sum of the gradients of x, or None, [grad_A, grad_B of each projection]).

        need_factors: for each of the factors, in this order. The gradients of others are None or of any size.
        """
        if self.is_group:
            run = self._kernel("linear_nf4_lora_group_backward", x).run
            needs = Needs(need_grad_x, any(need_factors[::2]), any(need_factors[1::2]))
            grad_x, grad_A, grads_B = run(grad_ys, x, saved[0], self.weights, self.lora, needs)
            grads_A = torch.split(grad_A, self.lora.ranks) if needs.need_grad_A else [None] * len(grads_B)
            each = [grad for pair in zip(grads_A, grads_B, strict=True) for grad in pair]
            return grad_x if need_grad_x else None, each
        total: Tensor | None = None
        grads: list[Tensor | None] = []
        # The last one first, as autograd runs the ops, so that the sum rounds alike.
        lists = (self.projections, grad_ys, saved, need_factors[::2], need_factors[1::2])
        for projection, grad_y, s, need_A, need_B in zip(*map(reversed, lists), strict=True):
            of_x, *of_factors = projection.backward(grad_y, x, s, Needs(need_grad_x, need_A, need_B))
            grads = [*of_factors, *grads]
            total = of_x if total is None or of_x is None else total.add_(of_x)
        return total, grads

    def by_op(self, x: Tensor) -> list[Tensor]:
        """Return the y [..., N] of each projection from ops, which are differentiable to any order."""
        if self.is_group and self.is_complete:
            return call_group(x, self.weights, self.biases, self.lora)
        return [each.by_op(x) for each in self.projections]

    def _kernel(self, op: str, x: Tensor) -> KernelSpec:
        return select(problem_of_group(op, x, self.weights, self.lora))


def run_as_one_node(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether projections that start from x [..., K] may run inside one autograd node.

    The ops themselves run in all other cases. They also raise the errors for operands that do not fit.
    """
    if x.dtype not in FLOAT_DTYPES or x.dim() < 2 or x.numel() == 0:
        return False
    tensors = [x]
    for weight, bias, lora in projections:
        N, K = weight.N, weight.K
        tensors.append(weight.packed)
        if N == 0 or K == 0:
            return False
        constants = [constant for constant in weight.constants if constant is not None]
        if lora is not None:
            lora_A, lora_B, r = lora.A, lora.B, lora.r
            tensors += [lora_A, lora_B]
            if r == 0 or lora_A.shape != (r, K) or lora_B.shape != (N, r):
                return False
            if not (lora_A.is_contiguous() and lora_B.is_contiguous()):
                return False
        if bias is not None:
            if bias.shape != (N,):
                return False
            constants.append(bias)
        tensors += constants
        for constant in constants:
            if constant.requires_grad:
                return False
    device = x.device
    for tensor in tensors:
        if tensor.device != device:
            return False
    return is_plain_call(*tensors)


def wanted(gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients that are needed, and None in place of the others."""
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
