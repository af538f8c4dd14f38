"""linear_nf4_multi_lora and its backward: the native plain linear, then ops/_multi_lora.py's rows by adapter."""

from __future__ import annotations

from torch import Tensor

from ...ops._multi_lora import add_backward, add_forward
from .kernels import linear_nf4, linear_nf4_grad_x


def linear_nf4_multi_lora(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    *,
    dropout_p: float,
    blocksize: int,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """(y, s)."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    y = linear_nf4(x, packed, *constants, bias, blocksize=blocksize, out_features=out_features)
    return y, add_forward(y, x, lora_A, lora_B, scalings, adapter, seed, dropout_p)


def linear_nf4_multi_lora_backward(
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
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    *,
    dropout_p: float,
    blocksize: int,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x or empty, grad_A, grad_B)."""
    constants = (absmax, absmax_q, absmax_scale, absmax_offset)
    grad_x = None
    if need_grad_x:
        grad_x = linear_nf4_grad_x(grad_y, packed, *constants, blocksize=blocksize, in_features=x.shape[1])
    grad_A, grad_B = add_backward(grad_x, grad_y, x, s, lora_A, lora_B, scalings, adapter, seed, dropout_p)
    return x.new_empty(0) if grad_x is None else grad_x, grad_A, grad_B
