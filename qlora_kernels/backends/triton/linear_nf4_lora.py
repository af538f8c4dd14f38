"""linear_nf4_lora and its backward: few launches over lora_down.py, linear_nf4.py, lora_up.py and lora_grads.py.

forward    s = dropout(x) A^T  (lora_down, one pass over x);  y = x W^T + bias + scaling * s B^T  (linear_nf4)
backward   ds, grad_B from one pass over grad_y;  grad_A from one pass over x;
           grad_x = grad_y W + keep * scale * (ds A)  (linear_nf4)
The dropout mask is drawn from the seed wherever it is needed; nothing but x and s is kept between the passes.
"""

from __future__ import annotations

from torch import Tensor

from ._dropout import dropout_of
from .linear_nf4 import LowRank, Weight, backward, forward
from .lora_down import lora_down
from .lora_grads import lora_ds_grad_B, lora_grad_A


def linear_nf4_lora(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """(y, s). See ops/linear_nf4_lora.py for the contract."""
    weight = Weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, out_features, x.shape[1])
    s = lora_down(x, lora_A, dropout_of(seed, dropout_p, x))
    return forward(x, weight, bias, LowRank(s, lora_B, scaling)), s


def linear_nf4_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    blocksize: int,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x or empty, grad_A, grad_B). See ops/linear_nf4_lora.py for the contract."""
    weight = Weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, grad_y.shape[1], x.shape[1])
    dropout = dropout_of(seed, dropout_p, x)
    ds, grad_B = lora_ds_grad_B(grad_y, s, lora_B, scaling)
    grad_A = lora_grad_A(x, ds, dropout, lora_A.dtype)
    grad_x = x.new_empty(0)
    if need_grad_x:
        grad_x = backward(grad_y, weight, LowRank(ds, lora_A, dropout.scale), dropout)
    return grad_x, grad_A, grad_B
