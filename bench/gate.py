"""The bounds that a result must keep before it is timed. Ours are the tests' own; peers' are coarser."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from python.numerics.linear_formulas import (
    Arithmetic,
    Dropout,
    arithmetic_of,
    linear,
    linear_grad_x,
    lora_backward,
    lora_down,
    lora_forward,
)
from python.numerics.tolerances import Expected, assert_within

__all__ = [
    "Dropout",
    "Expected",
    "arithmetic",
    "assert_close_to_peer",
    "assert_within",
    "linear",
    "linear_grad_x",
    "lora_backward",
    "lora_down",
    "lora_forward",
]

PEER_ERROR = 0.02
"""A peer rounds block constants or intermediate results to bf16, each an error below 0.4 % of its factor; a block read
with another's constant, a lost scale or an update left out is far beyond this."""


def arithmetic(dtype: torch.dtype, device: str) -> Arithmetic:
    """What our kernels for a device may round. 16-bit operands are multiplied exactly enough in float32."""
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    return replace(arithmetic_of("cpu" if device == "cpu" else "cuda", dtype), wide=wide)


def assert_close_to_peer(actual: Tensor, exact: Tensor, *, name: str) -> None:
    """|actual - exact| <= PEER_ERROR * |exact| in the Frobenius norm: a peer computes the same thing."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = (torch.linalg.vector_norm(actual.to(exact.dtype) - exact) / torch.linalg.vector_norm(exact)).item()
    assert error <= PEER_ERROR, f"{name}: relative error {error:.3f} exceeds {PEER_ERROR}"
