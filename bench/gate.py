"""The bounds that a result must keep before it is timed. Ours are the tests' own; peers' are coarser."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support import tolerances
from tests.support.tolerances import assert_within_baseline

__all__ = ["assert_close_to_peer", "assert_within_baseline", "tolerances", "wider"]

PEER_ERROR = 0.02
"""A peer rounds block constants or intermediate results to bf16, each an error below 0.4 % of its factor; a block read
with another's constant, a lost scale or an update left out is far beyond this."""


def assert_close_to_peer(actual: Tensor, exact: Tensor, *, name: str) -> None:
    """|actual - exact| <= PEER_ERROR * |exact| in the Frobenius norm: a peer computes the same thing."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = (torch.linalg.vector_norm(actual.to(exact.dtype) - exact) / torch.linalg.vector_norm(exact)).item()
    assert error <= PEER_ERROR, f"{name}: relative error {error:.3f} exceeds {PEER_ERROR}"


def wider(tensor: Tensor) -> Tensor:
    """The tensor in the next wider dtype, in which sums are exact beside the narrow dtype's roundings."""
    return tensor.double() if tensor.dtype == torch.float32 else tensor.float()
