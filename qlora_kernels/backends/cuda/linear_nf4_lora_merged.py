"""linear_nf4_lora_merged and its backward: csrc/cuda/merge_lora.cu writes W', and torch's matmul multiplies.

Where the routing decodes inside the product, which happens for few rows, the update stays apart (linear_nf4_lora).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import composed_merged_lora
from ...ops.extended_k import padded
from ...ops.operands import LoRA, Needs, Weight
from .codec import dequantize_nf4
from .linear_nf4 import linear_nf4_lora, linear_nf4_lora_backward, runs_decoded
from .lora_down import aligned

_C = torch.ops.qlora_kernels_C

COLUMNS, MOST_RANK = 64, 64
"""merge_lora.cu takes whole groups of 64 columns, and ranks up to 64."""


def merge_lora(weight: Weight, lora: LoRA, out: Tensor) -> None:
    """Write W + scaling * B A to out [N, K], with one rounding to its dtype."""
    if out.dtype == torch.float32 or weight.K % COLUMNS or lora.r > MOST_RANK:
        _merge_by_torch(weight, lora, out)
        return
    factors = (_padded(lora.A.T, out), _padded(lora.B, out))
    _C.cuda_merge_lora(aligned(weight.packed), *weight.constants, *factors, lora.scaling, weight.blocksize, out)


def _padded(factor: Tensor, like: Tensor) -> Tensor:
    """Return a factor [rows, r] in like's dtype, contiguous, with r padded to a multiple of 16 by zeros."""
    rows, r = factor.shape
    new = like.new_empty if padded(r) == r else like.new_zeros
    whole = new(rows, padded(r))
    whole[:, :r].copy_(factor.detach())
    return whole


_merge_by_torch = composed_merged_lora.merge_by_torch(dequantize_nf4)


def linear_nf4_lora_merged(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> Tensor:
    """Return y [M, N] = x W'^T + bias."""
    if not runs_decoded("linear_nf4", x, weight):
        return linear_nf4_lora(x, weight, bias, lora)[0]
    return composed_merged_lora.forward(x, weight, bias, lora, merge_lora)


def linear_nf4_lora_merged_backward(
    grad_y: Tensor, x: Tensor, weight: Weight, lora: LoRA, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x [M, K], grad_A, grad_B), empty where not needed."""
    s = x @ lora.A.to(x.dtype).T if needs.need_grad_B else x.new_empty(0)
    if not (needs.need_grad_x and runs_decoded("linear_nf4_grad_x", grad_y, weight)):
        return linear_nf4_lora_backward(grad_y, x, s, weight, lora, needs)
    _, grad_A, grad_B = linear_nf4_lora_backward(grad_y, x, s, weight, lora, needs._replace(need_grad_x=False))
    return composed_merged_lora.grad_x(grad_y, weight, lora, merge_lora), grad_A, grad_B
