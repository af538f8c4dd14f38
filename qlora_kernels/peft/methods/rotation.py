"""Orthogonal matrices from skew-symmetric ones, and block-diagonal products with them, for OFT and BOFT."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(skew: Tensor) -> Tensor:
    """Return the orthogonal matrix (I - Q)(I + Q)^-1 for skew-symmetric Q [..., b, b]."""
    identity = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    rotation: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return rotation


def cayley_neumann(skew: Tensor, terms: int) -> Tensor:
    """Return I + 2 (Q + Q^2 + ...) + Q^(terms - 1), which for small Q [..., b, b] is nearly the inverse of cayley(Q).

    terms: 1 gives I, 2 gives I + 2 Q, and 3 gives the same as 4. Source: PEFT's OFT, which computes this sum.
    """
    rotation = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    highest = max(terms, 4) - 1 if terms > 2 else terms - 1
    power = skew
    for exponent in range(1, highest + 1):
        power = power if exponent == 1 else power @ skew
        rotation = rotation + (power if exponent == highest > 1 else 2.0 * power)
    return rotation


def rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x [..., K] times the block-diagonal matrix of `blocks` [D, b, b], or of one repeated block [1, b, b]."""
    b = blocks.shape[-1]
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // b, b)
    return torch.einsum("...db,dbc->...dc", parts, blocks.expand(parts.shape[-2], b, b)).reshape(x.shape)


def drop_blocks(blocks: Tensor, p: float) -> Tensor:
    """Return `blocks` [D, b, b] with a fraction p of them, rounded down, replaced by the identity."""
    count = blocks.shape[0]
    dropped = torch.randperm(count, device=blocks.device) < int(p * count)
    identity = torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype)
    return torch.where(dropped[:, None, None], identity, blocks)
