"""linear_nf4_lora and its backward, composed of torch's ops."""

from __future__ import annotations

from torch import Tensor

from ...ops.operands import LoRA, Needs, Weight
from ...ops.philox import dropped
from .linear_nf4 import linear_nf4, linear_nf4_grad_x


def linear_nf4_lora(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> tuple[Tensor, Tensor]:
    """Return y = x W^T + bias + scaling s B^T and s = dropout(x) A^T."""
    s = dropped(x, lora.seed, lora.dropout_p) @ lora.A.to(x.dtype).T
    return linear_nf4(x, weight, bias) + lora.scaling * (s @ lora.B.to(x.dtype).T), s


def linear_nf4_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Weight,
    lora: LoRA,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x, grad_A, grad_B), empty where not needed."""
    ds = lora.scaling * (grad_y @ lora.B.to(x.dtype)) if needs.need_ds else x.new_empty(0)
    grad_B = lora.scaling * (grad_y.T @ s) if needs.need_grad_B else x.new_empty(0)
    grad_A = ds.T @ dropped(x, lora.seed, lora.dropout_p) if needs.need_grad_A else x.new_empty(0)
    grad_x = x.new_empty(0)
    if needs.need_grad_x:
        through_dropout = dropped(ds @ lora.A.to(x.dtype), lora.seed, lora.dropout_p)
        grad_x = linear_nf4_grad_x(grad_y, weight) + through_dropout
    return grad_x, grad_A.to(lora.A.dtype), grad_B.to(lora.B.dtype)
