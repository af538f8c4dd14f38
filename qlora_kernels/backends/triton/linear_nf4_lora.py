"""linear_nf4_lora and its backward by the kernels of lora_down.py, linear_nf4.py, lora_up.py and lora_grads.py.

forward    s = dropout(x) A^T  (lora_down, one pass over x);  y = x W^T + bias + scaling * s B^T  (linear_nf4)
backward   ds, grad_B from one pass over grad_y;  grad_A from one pass over x;
           grad_x = grad_y W + keep * scale * (ds A)  (linear_nf4)
Where the weight is decoded first, the product may run over K + r instead (linear_nf4_lora_group.py, for one linear).
The dropout mask is computed from the seed where it is needed; only x and s are saved for backward.
"""

from __future__ import annotations

from torch import Tensor

from ...ops.extended_k import group_of_one
from ...ops.operands import LoRA, Weight
from .dropout import dropout_of
from .linear_nf4 import LowRankTerm, added_outside, backward, forward
from .linear_nf4_lora_group import linear_nf4_lora_group, linear_nf4_lora_group_backward
from .lora_down import lora_down
from .lora_grads import lora_ds_grad_B, lora_grad_A


def linear_nf4_lora(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> tuple[Tensor, Tensor]:
    """Return (y, s). See ops/linear_nf4_lora.py for the contract."""
    dropout = dropout_of(lora.seed, lora.dropout_p, x)
    if not added_outside("linear_nf4_lora", x, [weight], dropout):
        (y,), s = linear_nf4_lora_group(x, [weight], [bias], group_of_one(lora))
        return y, s
    s = lora_down(x, lora.A, dropout)
    return forward(x, weight, bias, LowRankTerm(s, lora.B, lora.scaling)), s


def linear_nf4_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Weight,
    lora: LoRA,
    *,
    need_grad_x: bool,
    need_grad_A: bool = True,
    need_grad_B: bool = True,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x or empty, grad_A or empty, grad_B). See ops/linear_nf4_lora.py for the contract.

    ds and grad_B are one pass over grad_y, so grad_B is always computed.
    """
    dropout = dropout_of(lora.seed, lora.dropout_p, x)
    if need_grad_x and not added_outside("linear_nf4_lora_backward", x, [weight], dropout):
        grad_x, grad_A, (grad_B,) = linear_nf4_lora_group_backward(
            [grad_y], x, s, [weight], group_of_one(lora), need_grad_x=True, need_grad_A=need_grad_A
        )
        return grad_x, grad_A, grad_B
    ds, grad_B = lora_ds_grad_B(grad_y, s, lora.B, lora.scaling)
    grad_A = lora_grad_A(x, ds, dropout, lora.A.dtype) if need_grad_A else x.new_empty(0)
    grad_x = x.new_empty(0)
    if need_grad_x:
        grad_x = backward(grad_y, weight, LowRankTerm(ds, lora.A, dropout.scale), dropout)
    return grad_x, grad_A, grad_B
