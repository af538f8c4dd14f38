"""linear_nf4_lora_merged composed of a decoder that adds the update, and torch's products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .operands import LoRA, Needs, Weight

Merge = Callable[[Weight, LoRA, Tensor], None]
"""merge(weight, lora, out): out [N, K] = W + scaling * B A, with the factors in out's dtype and one rounding."""
Decode = Callable[..., None]
"""decode(weight, *, out): dequantize weight into out [N, K]; a backend's dequantize_nf4."""


def forward(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA, merge: Merge) -> Tensor:
    """Return y = x W'^T + bias."""
    w = x.new_empty(weight.N, weight.K)
    merge(weight, lora, w)
    return x @ w.T if bias is None else torch.addmm(bias.to(x.dtype), x, w.T)


def grad_x(grad_y: Tensor, weight: Weight, lora: LoRA, merge: Merge) -> Tensor:
    """Return grad_x = grad_y W'."""
    w = grad_y.new_empty(weight.N, weight.K)
    merge(weight, lora, w)
    return grad_y @ w


def merge_by_torch(decode: Decode) -> Merge:
    """Return a merge that decodes to fp32, adds the update with fp32 sums, and rounds once."""

    def merge(weight: Weight, lora: LoRA, out: Tensor) -> None:
        w = out.new_empty(weight.N, weight.K, dtype=torch.float32)
        decode(weight, out=w)
        A, B = (factor.detach().to(out.dtype).float() for factor in (lora.A, lora.B))
        out.copy_(w.addmm_(B, A, alpha=lora.scaling))

    return merge


def compose_lora_merged(decode: Decode) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Return linear_nf4_lora_merged and its backward op by torch's products, from a backend's decoder."""
    merge = merge_by_torch(decode)

    def linear_nf4_lora_merged(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> Tensor:
        """Return y."""
        return forward(x, weight, bias, lora, merge)

    def linear_nf4_lora_merged_backward(
        grad_y: Tensor, x: Tensor, weight: Weight, lora: LoRA, needs: Needs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (grad_x, grad_A, grad_B), empty where not needed."""
        grad_A, grad_B = lora.A.new_empty(0), lora.B.new_empty(0)
        if needs.need_grad_A:
            ds = lora.scaling * (grad_y @ lora.B.to(x.dtype))
            grad_A = (ds.T @ x).to(lora.A.dtype)
        if needs.need_grad_B:
            s = x @ lora.A.to(x.dtype).T
            grad_B = (lora.scaling * (grad_y.T @ s)).to(lora.B.dtype)
        return grad_x(grad_y, weight, lora, merge) if needs.need_grad_x else x.new_empty(0), grad_A, grad_B

    return linear_nf4_lora_merged, linear_nf4_lora_merged_backward
