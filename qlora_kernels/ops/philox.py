"""The dropout mask of the fused LoRA ops, a pure function of (seed, element index) that backward regenerates.

    words(c)  = philox4x32-10 with key = seed and counter = (c low 32, c high 32, 0, 0)
    draw(i)   = 16-bit half (i & 1) of word (i >> 1) & 3 of words(i >> 3),      i = m * K + k
    keep(i)   = draw(i) >= threshold,     threshold = round(dropout_p * 2**16)
    scale     = 2**16 / (2**16 - threshold)

The scale is computed from the threshold, not from dropout_p, so that the expectation is exact. The effective
probability differs from dropout_p by at most 2**-17.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC'11), Philox4x32 with 10 rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
DRAW_BITS = 16
_MASK32 = 0xFFFFFFFF


def keep_threshold(dropout_p: float) -> int:
    """Return the threshold below which a 16-bit draw drops its element."""
    return round(dropout_p * (1 << DRAW_BITS))


def keep_scale(dropout_p: float) -> float:
    """Return the factor by which dropout multiplies kept values."""
    return (1 << DRAW_BITS) / ((1 << DRAW_BITS) - keep_threshold(dropout_p))


def philox(seed: int, counter: Tensor) -> Tensor:
    """Return four 32-bit words for each counter: int64 [n] below 2**63 -> int64 [n, 4]."""
    c0, c1 = counter & _MASK32, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _MASK32, (k1 + WEYL[1]) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=1)


def dropout_keep(seed: Tensor, M: int, K: int, dropout_p: float) -> Tensor:
    """Return bool [M, K], True for kept elements, on seed's device. seed: int64, one element."""
    calls = torch.arange((M * K + 7) // 8, dtype=torch.int64, device=seed.device)
    words = philox(int(seed.item()), calls)
    draws = torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)[: M * K]
    return (draws >= keep_threshold(dropout_p)).view(M, K)


def dropped(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Return dropout(x) for x [M, K]."""
    if seed is None or dropout_p == 0.0:
        return x
    keep = dropout_keep(seed, x.shape[0], x.shape[1], dropout_p)
    return torch.where(keep, x * keep_scale(dropout_p), 0.0)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the (high, low) 32-bit words of a * b, computed by halves because int64 cannot hold the whole product."""
    low_part = (a & 0xFFFF) * b
    high_part = (a >> 16) * b + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)
