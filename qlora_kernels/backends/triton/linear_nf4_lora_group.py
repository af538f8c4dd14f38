"""linear_nf4_lora_group and its backward; each pass reads x once.

forward    s of all adapters by one lora_down over x;  then each y_i with its low-rank term
backward   ds_i, grad_B_i from one pass over each grad_y_i;  grad_A of all by one pass over x;
           grad_x starts as grad_y_1 W_1 + keep * scale * (ds A), the low-rank term of all; the others
           are added inside torch's matmul if the weight is decoded first, otherwise by a separate addition

Where weights are decoded first, the products may run over K + r instead (ops/extended_k.py): lora_down also copies x,
and the pass over a grad_y also copies that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import extended_k
from ...ops.composed_lora_group import split_by_rank
from ...ops.operands import GroupLoRA, Needs, Weight
from .dropout import dropout_of
from .linear_nf4 import (
    LowRankTerm,
    add_low_rank,
    added_outside,
    backward,
    decode_into,
    decoded,
    forward,
    plan_for,
)
from .lora_down import lora_down
from .lora_grads import lora_ds_grad_B, lora_grad_A


def linear_nf4_lora_group(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], lora: GroupLoRA
) -> tuple[list[Tensor], Tensor]:
    """Return (ys, s). See ops/linear_nf4_lora_group.py for the contract."""
    dropout = dropout_of(lora.seed, lora.dropout_p, x)
    if not added_outside("linear_nf4_lora_group", x, weights, dropout):
        both = extended_k.operand(x, x.shape[1], max(lora.ranks))
        s = lora_down(x, lora.A, dropout, both[:, : x.shape[1]])
        return extended_k.forward(both, s, weights, biases, lora, decode_into), s
    s = lora_down(x, lora.A, dropout)
    members = zip(weights, biases, split_by_rank(s, lora), lora.B, lora.scalings, strict=True)
    return [forward(x, weight, bias, LowRankTerm(part, B, scaling)) for weight, bias, part, B, scaling in members], s


def linear_nf4_lora_group_backward(
    grad_ys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    weights: Sequence[Weight],
    lora: GroupLoRA,
    needs: Needs,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (grad_x, grad_A, grads of B), empty where not needed. See ops/linear_nf4_lora_group.py for the contract.

    ds and grad_B are one pass over each grad_y.
    """
    dropout = dropout_of(lora.seed, lora.dropout_p, x)
    extends = needs.need_grad_x and not added_outside("linear_nf4_lora_group_backward", x, weights, dropout)
    inside = extends and not dropout.on
    widths = [weight.N for weight in weights]
    both = extended_k.operand(x, sum(widths), lora.r if inside else 0) if extends else None
    copies = [None] * len(widths) if both is None else torch.split(both[:, : sum(widths)], widths, dim=1)
    members = zip(grad_ys, split_by_rank(s, lora), lora.B, lora.scalings, copies, strict=True)
    results = [lora_ds_grad_B(grad_y, part, B, scale, needs, copy) for grad_y, part, B, scale, copy in members]
    parts_of_ds, grads_B = zip(*results, strict=True)
    if not needs.need_ds:
        return x.new_empty(0), lora.A.new_empty(0), list(grads_B)
    ds = parts_of_ds[0] if len(parts_of_ds) == 1 else torch.cat(parts_of_ds, dim=1)
    grad_A = lora_grad_A(x, ds, dropout, lora.A.dtype) if needs.need_grad_A else lora.A.new_empty(0)
    if not needs.need_grad_x:
        return x.new_empty(0), grad_A, list(grads_B)
    low_rank = LowRankTerm(ds, lora.A, dropout.rate.scale)
    if both is not None:
        grad_x = extended_k.backward(both, weights, (ds, lora.A) if inside else None, decode_into)
        if not inside:
            add_low_rank(grad_x, low_rank, dropout)
        return grad_x, grad_A, list(grads_B)
    grad_x = backward(grad_ys[0], weights[0], low_rank, dropout)
    no_dropout = dropout_of(None, 0.0, x)
    for grad_y, weight in zip(grad_ys[1:], weights[1:], strict=True):
        if plan_for("linear_nf4_grad_x", grad_y, weight).path == "decode":
            grad_x.addmm_(grad_y, decoded(weight, grad_y.dtype))
        else:
            grad_x += backward(grad_y, weight, None, no_dropout)
    return grad_x, grad_A, list(grads_B)
