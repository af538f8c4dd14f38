"""Matrix products by torch's library, with a factor inside the call, or with unrounded fp32 sums as the result."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return scaling * (a @ b) in a's dtype, rounded once; a, b: matrices of one dtype."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32, the sums without rounding to the operands' dtype; a, b: matrices of one dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # torch's CPU kernels have no such product; the tests run this backend on CPU tensors
