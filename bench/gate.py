"""The bounds on a result before it is timed: the tests' bounds for this project, coarser ones for peers."""

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
    "assert_quantizes",
    "assert_within",
    "linear",
    "linear_grad_x",
    "lora_backward",
    "lora_down",
    "lora_forward",
]

PEER_ERROR = 0.02
"""A peer rounds block constants or intermediate results to bf16, each with an error below 0.4 % of its factor. Wrong
constants, a lost scale or a missing update cause much larger errors."""

QUANTIZATION_ERROR = 0.15
"""Error of a weight of normal numbers in 4 bits, relative to the weight: 0.09 for NF4, 0.11 for symmetric int4."""


def arithmetic(dtype: torch.dtype, device: str) -> Arithmetic:
    """Return the roundings of our kernels on a device. Products of 16-bit operands are exact enough in float32."""
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    return replace(arithmetic_of("cpu" if device == "cpu" else "cuda", dtype), wide=wide)


def assert_close_to_peer(actual: Tensor, exact: Tensor, *, name: str) -> None:
    """Assert |actual - exact| <= PEER_ERROR * |exact| in the Frobenius norm."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = (torch.linalg.vector_norm(actual.to(exact.dtype) - exact) / torch.linalg.vector_norm(exact)).item()
    assert error <= PEER_ERROR, f"{name}: relative error {error:.3f} exceeds {PEER_ERROR}"


def assert_quantizes(own: Tensor, source: Tensor) -> None:
    """Assert that a peer's own 4- or 8-bit weight is a quantization of the source weight, within QUANTIZATION_ERROR."""
    error = ((own - source.float()).norm() / source.float().norm()).item()
    assert error <= QUANTIZATION_ERROR, f"weight: relative error {error:.3f} exceeds {QUANTIZATION_ERROR}"
