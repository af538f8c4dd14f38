"""The rows that the autograd functions of LoRA linears keep for backward: x for grad_A, s for grad_B.

Where a factor is frozen, its gradient is not computed, and what only that gradient reads is not kept. Kernels then get
a tensor of the same shape, whose memory they do not read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def rows_to_save(
    ctx: Any, x: Tensor, s: Tensor, need_grad_x: bool, need_grad_A: bool, need_grad_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (x, s) for `ctx.save_for_backward`, with None in place of what no gradient reads.

    s is differentiable where grad_B is computed of it and x is not kept: second derivatives then reach x through s.
    """
    ctx.set_materialize_grads(False)  # no zeros for s, which would be one more launch
    if need_grad_A or not (need_grad_x and need_grad_B):
        ctx.mark_non_differentiable(s)
    if need_grad_A and need_grad_B:
        return x, s
    ctx.x_shape, ctx.s_shape = x.shape, s.shape
    return x if need_grad_A else None, s if need_grad_B else None


def saved_rows(ctx: Any, grad_y: Tensor, x: Tensor | None, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (x, s) for a backward op, with uninitialized memory in place of what was not kept."""
    x = grad_y.new_empty(ctx.x_shape) if x is None else x
    return x, grad_y.new_empty(ctx.s_shape) if s is None else s
