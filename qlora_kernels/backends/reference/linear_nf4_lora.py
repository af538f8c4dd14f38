"""linear_nf4_lora and its backward, composed of torch's own operations."""

from __future__ import annotations

from torch import Tensor

from ...ops._multi_lora import dropped
from .linear_nf4 import linear_nf4, linear_nf4_grad_x


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
    """y = x W^T + bias + scaling s B^T and s = dropout(x) A^T."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    y = linear_nf4(x, packed, *constants, bias, blocksize=blocksize, out_features=out_features)
    s = dropped(x, seed, dropout_p) @ lora_A.to(x.dtype).T
    return y + scaling * (s @ lora_B.to(x.dtype).T), s


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
    """(grad_x or empty, grad_A, grad_B)."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    ds = scaling * (grad_y @ lora_B.to(x.dtype))
    grad_B = scaling * (grad_y.T @ s)
    grad_A = ds.T @ dropped(x, seed, dropout_p)
    grad_x = x.new_empty(0)
    if need_grad_x:
        grad_x = linear_nf4_grad_x(grad_y, packed, *constants, blocksize=blocksize, in_features=x.shape[1])
        grad_x = grad_x + dropped(ds @ lora_A.to(x.dtype), seed, dropout_p)
    return grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
