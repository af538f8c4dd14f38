"""s = dropout(x) A^T by csrc/cuda/lora_down.cu, with a copy of x in the same pass, or by torch's product."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.operands import GroupLoRA, LoRA
from ...ops.philox import keep_scale, keep_threshold

_C = torch.ops.qlora_kernels_C

MOST_RANK = 64
"""Columns of s in one launch."""

ALIGNMENT = 16
"""Bytes of the widest access in the kernels."""


def kernel_obstacle(dtype: torch.dtype, columns: int) -> str | None:
    """Return why the kernel cannot read rows of `columns` elements, or None."""
    if dtype == torch.float32:
        return "fp32 has no tensor-core kernel here"
    return f"rows of {columns} are not whole 16-byte pieces" if columns % 8 else None


def lora_down(x: Tensor, lora: LoRA | GroupLoRA, copy: Tensor | None = None) -> Tensor:
    """Return s [M, r] of x.dtype, and write x [M, K] to `copy`, whose rows may have a stride, where it is given."""
    A = lora.A.to(x.dtype)
    if copy is None and (not drops(lora) or kernel_obstacle(x.dtype, x.shape[1]) is not None):
        return dropped(x, lora) @ A.T
    if not drops(lora):
        return project(x, A, 1.0, copy)
    mask = (lora.seed, keep_threshold(lora.dropout_p))
    return project(x, A, keep_scale(lora.dropout_p), copy, mask)


def project(
    x: Tensor, factor: Tensor, scale: float, copy: Tensor | None, mask: tuple[Tensor | None, int] = (None, 0)
) -> Tensor:
    """Return scale * keep(x) factor^T [M, r] by the kernel, for factor [r, K] of x's dtype, and write x to `copy`.

    mask: the seed of dropout and the smallest draw that is kept.
    """
    x, factor = aligned(x), aligned(factor.contiguous())
    s = x.new_empty(x.shape[0], factor.shape[0])
    for start in range(0, factor.shape[0], MOST_RANK):
        part = slice(start, start + MOST_RANK)
        _C.cuda_lora_down(x, factor[part], *mask, scale, s[:, part], copy if start == 0 else None)
    return s


def dropped(x: Tensor, lora: LoRA | GroupLoRA) -> Tensor:
    """Return dropout(x) [M, K], a copy in x's dtype, or x itself without dropout."""
    if not drops(lora):
        return x
    y = torch.empty_like(x)
    dropout(x, lora, y, add=False)
    return y


def dropout(x: Tensor, lora: LoRA | GroupLoRA, y: Tensor, *, add: bool) -> None:
    """Write x with dropout to y, or add it to y, for contiguous [M, K]; each call draws the mask again."""
    p = lora.dropout_p
    _C.cuda_dropout(x, lora.seed, keep_threshold(p), keep_scale(p), add, y)


def drops(lora: LoRA | GroupLoRA) -> bool:
    """Whether the adapter's input goes through dropout."""
    return lora.seed is not None and lora.dropout_p > 0


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if it does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
