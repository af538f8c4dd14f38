"""The norm in front of a block of a decoder layer and the addition behind it, y = x + block(norm(x)), as a part of the
block's autograd node.

A backend may have one kernel for a whole block (`kernel_of`). Otherwise a node runs the kernels of its ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch_fast_path import is_plain_call
from .lora_projection import Projection
from .registry import KernelSpec, Problem, device_type, find, select
from .rms_norm import rms_norm


class BlockNorm(NamedTuple):
    """The arguments of the op rms_norm for the norm of a block's input.   weight: [C]."""

    weight: Tensor
    eps: float
    weight_offset: float

    def fits(self, x: Tensor) -> bool:
        """Whether the norm of x can run inside a node, with a result of x's dtype."""
        weight = self.weight
        return (
            weight.shape == x.shape[-1:]
            and weight.device == x.device
            and weight.is_contiguous()
            and (weight.dtype == x.dtype or self.weight_offset == 1.0)
            and self.eps >= 0
            and is_plain_call(weight)
        )


class NodeNeeds(NamedTuple):
    """The gradients that a node's backward has to compute: of x, of the norm's weight, and of each factor."""

    x: bool
    norm_weight: bool
    factors: Sequence[bool]

    @staticmethod
    def of(ctx: Any) -> NodeNeeds:
        """Return the needs of a node whose arguments are (bundle, x, norm_weight, *factors)."""
        _, x, norm_weight, *factors = ctx.needs_input_grad
        return NodeNeeds(x, norm_weight, factors)


def kernel_of(op: str, x: Tensor, projections: Sequence[Projection]) -> KernelSpec | None:
    """Return the kernel that runs a whole block, or None if the block's ops have to run one after the other."""
    dropout = any(each.lora is not None and each.lora.dropout_p > 0 for each in projections)
    return find(Problem(op, device_type(x), x.dtype, dropout=dropout))


def normalized(rows: Tensor, norm: BlockNorm | None) -> tuple[Tensor, Tensor | None]:
    """Return (norm(rows), scale) by the kernel of rms_norm, or (rows, None) without a norm."""
    if norm is None:
        return rows, None
    run = select(Problem("rms_norm", rows.device.type, rows.dtype)).run
    n, _, scale = run(rows, None, norm.weight, norm.eps, norm.weight_offset)
    return n, scale


def normalized_backward(
    grad_n: Tensor | None, grad_y: Tensor, rows: Tensor, norm: BlockNorm | None, scale: Tensor | None, needs: NodeNeeds
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of rows and of the norm's weight, for grad_n of norm(rows) and grad_y of the block."""
    if norm is None or grad_n is None:
        return grad_n, None
    run = select(Problem("rms_norm_backward", rows.device.type, rows.dtype)).run
    grad_x, grad_weight = run(
        grad_n, grad_y, rows, norm.weight, scale, norm.weight_offset, need_grad_weight=needs.norm_weight
    )
    return grad_x, grad_weight if needs.norm_weight else None


def by_ops(x: Tensor, norm: BlockNorm | None, block: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x + block(norm(x)), or block(x) without a norm, from ops that are differentiable to any order."""
    if norm is None:
        return block(x)
    n, _ = rms_norm(x, norm.weight, norm.eps, weight_offset=norm.weight_offset)
    return x + block(n)


def gradients_by_ops(
    compute: Callable[..., Tensor], ctx: Any, grad_y: Tensor, *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a node's arguments (bundle, *inputs), which can be differentiated in turn.

    compute(*inputs): the node's result, of differentiable ops.   ctx: of the node, for the gradients it needs.
    """
    needed = ctx.needs_input_grad[1 : 1 + len(inputs)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [
            t if create_graph or t is None else t.detach().requires_grad_(need)
            for t, need in zip(inputs, needed, strict=True)
        ]
        sources = [t for t, need in zip(given, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(compute(*given), sources, grad_y, create_graph=create_graph))
    return None, *[next(found) if need else None for need in needed]
