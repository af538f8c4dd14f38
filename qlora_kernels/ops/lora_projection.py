"""A LoRA linear over NF4 as one step of a larger autograd node, and the conditions under which such nodes may run.

A transformer block consists of about thirteen ops. Each op costs a pass through torch's dispatcher, checks and a graph
node, in Python and on one thread. In a training step of SmolLM2-135M (1024 tokens, two cores) this is a tenth of the
time. gated_mlp.py and lora_attention.py therefore run the kernels of several ops in one torch.autograd.Function. The
kernels, their order and their results are those of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..format.quant_state import FLOAT_DTYPES
from ._linear import problem_of
from .dispatch_fast_path import is_plain_call
from .operands import LoRA, Weight
from .registry import select


class Projection(NamedTuple):
    """A linear layer y = x W^T + bias + scaling * (x A^T) B^T.   bias: [N], a constant, or None.

    lora: an adapter without dropout.
    """

    weight: Weight
    bias: Tensor | None
    lora: LoRA

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y [M, N], s [M, r]) for a contiguous x [M, K]."""
        run = select(problem_of("linear_nf4_lora", x, self.weight, self.lora)).run
        y, s = run(x, self.weight, self.bias, self.lora)
        return y, s

    def backward(
        self, grad_y: Tensor, x: Tensor, s: Tensor, lora_A: Tensor, lora_B: Tensor, *, need_grad_x: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (grad_x [M, K] or empty, grad_A, grad_B).   lora_A, lora_B: the factors as autograd saved them."""
        lora = self.lora._replace(A=lora_A, B=lora_B)
        run = select(problem_of("linear_nf4_lora_backward", x, self.weight, lora)).run
        grad_x, grad_A, grad_B = run(grad_y, x, s, self.weight, lora, need_grad_x=need_grad_x)
        return grad_x, grad_A, grad_B

    def by_op(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Return y [..., N] from the op, which is differentiable to any order."""
        lora = self.lora._replace(A=lora_A, B=lora_B)
        y: Tensor = torch.ops.qlora_kernels.linear_nf4_lora(x, *self.weight, self.bias, *lora)[0]
        return y


def run_as_one_node(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether projections that start from x [..., K] may run inside one autograd node.

    The ops themselves run in all other cases. They also raise the errors for operands that do not fit.
    """
    if x.dtype not in FLOAT_DTYPES or x.dim() < 2 or x.numel() == 0:
        return False
    tensors = [x]
    for weight, bias, lora in projections:
        lora_A, lora_B, N, K, r = lora.A, lora.B, weight.N, weight.K, lora.r
        tensors += [weight.packed, lora_A, lora_B]
        if N == 0 or K == 0 or r == 0 or lora.dropout_p > 0 or lora_A.shape != (r, K) or lora_B.shape != (N, r):
            return False
        if not (lora_A.is_contiguous() and lora_B.is_contiguous()):
            return False
        constants = [constant for constant in weight.constants if constant is not None]
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


def wanted(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients that are needed, and None in place of the others."""
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


def gradients_by_ops(
    compute: Callable[..., Tensor], ctx: Any, grad_y: Tensor, x: Tensor, *factors: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a node's (x, bundle, *factors), which can be differentiated in turn.

    compute(x, *factors): the node's result, of differentiable ops.   ctx: of the node, for the gradients it needs.
    """
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2 : 2 + len(factors)])
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [
            t if create_graph else t.detach().requires_grad_(need)
            for t, need in zip((x, *factors), needed, strict=True)
        ]
        sources = [t for t, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(compute(*inputs), sources, grad_y, create_graph=create_graph))
    grad_x, *grads = [next(found) if need else None for need in needed]
    return grad_x, None, *grads
