"""The shapes that every kernel is tested with, and the backends that can run an op.

The shapes always include a prime size, an empty one, blocks that straddle rows, a short last block, and an odd number
of weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qlora_kernels.ops.registry import BACKENDS, kernels_of, unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """Return bf16, fp16 or fp32."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def usable_backends(op: str) -> list[str]:
    """Return the backends with a kernel for `op` that run on this machine's CPU tensors."""
    return [b for b in BACKENDS if unavailable(b) is None and op in kernels_of(b) and _serves_cpu_tensors(b)]


def _serves_cpu_tensors(backend: str) -> bool:
    return backend in ("reference", "cpu") or (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True)
class Shape:
    """One linear problem: x [M, K], W [N, K], rank r."""

    M: int
    N: int
    K: int
    r: int = 4
    blocksize: int = 64

    def __str__(self) -> str:
        return f"M{self.M}-N{self.N}-K{self.K}-r{self.r}-b{self.blocksize}"


SHAPES = (
    Shape(1, 64, 64),
    Shape(7, 33, 96),  # K is not a multiple of the blocksize, N is odd: blocks straddle rows
    Shape(5, 17, 31, r=1, blocksize=32),  # all prime; an odd number of weights
    Shape(0, 32, 64),
    Shape(19, 130, 257, r=8, blocksize=128),
    Shape(64, 192, 320, r=16),
    Shape(129, 96, 576, r=16, blocksize=256),
    Shape(3, 1, 4099, r=2, blocksize=4096),
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gaussian(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return standard normal numbers from a separate generator."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)
