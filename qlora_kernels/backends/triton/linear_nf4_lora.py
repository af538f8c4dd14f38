"""linear_nf4_lora and its backward by the kernels of lora_down.py, linear_nf4.py, lora_up.py and lora_grads.py.

forward    s = dropout(x) A^T  (lora_down, one pass over x);  y = x W^T + bias + scaling * s B^T  (linear_nf4)
backward   ds, grad_B from one pass over grad_y;  grad_A from one pass over x;
           grad_x = grad_y W + keep * scale * (ds A)  (linear_nf4)
The dropout mask is computed from the seed where it is needed; only x and s are saved for backward.
"""

from __future__ import annotations

from torch import Tensor

from ...ops.operands import LoRA, Weight
from .dropout import dropout_of
from .linear_nf4 import LowRankTerm, backward, forward
from .lora_down import lora_down
from .lora_grads import lora_ds_grad_B, lora_grad_A


def linear_nf4_lora(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> tuple[Tensor, Tensor]:
    """Return (y, s). See ops/linear_nf4_lora.py for the contract."""
    s = lora_down(x, lora.A, dropout_of(lora.seed, lora.dropout_p, x))
    return forward(x, weight, bias, LowRankTerm(s, lora.B, lora.scaling)), s


def linear_nf4_lora_backward(
    grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: LoRA, *, need_grad_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x or empty, grad_A, grad_B). See ops/linear_nf4_lora.py for the contract."""
    dropout = dropout_of(lora.seed, lora.dropout_p, x)
    ds, grad_B = lora_ds_grad_B(grad_y, s, lora.B, lora.scaling)
    grad_A = lora_grad_A(x, ds, dropout, lora.A.dtype)
    grad_x = x.new_empty(0)
    if need_grad_x:
        grad_x = backward(grad_y, weight, LowRankTerm(ds, lora.A, dropout.scale), dropout)
    return grad_x, grad_A, grad_B
