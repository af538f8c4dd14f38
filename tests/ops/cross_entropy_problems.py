"""Small output heads and labels for the tests of linear_cross_entropy."""

from __future__ import annotations

import pytest
import torch

from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends

OP = "linear_cross_entropy"

backends = pytest.mark.parametrize("backend", usable_backends(OP))

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

SHAPES = {
    "one token": (1, 5, 3),
    "blocks and chunks that are not full": (261, 517, 65),
    "one chunk": (13, 256, 64),
    "one column beyond a chunk": (40, 257, 32),
    "a long contraction": (6, 33, 2100),
    "vocabulary of one": (4, 1, 8),
}

PIECES = {
    "more chunks than parts": (3, 4700, 16),
    "low-rank columns in two pieces": (7, 33, 254),
}
"""Shapes for single tests: the CPU kernel runs over several chunks in turn, and reads a row of the weight in pieces."""


def problem(shape, dtype, *, bias=False, weight_dtype=None):
    """Return hidden, weight, labels, bias of a head that is neither uniform nor certain; every fifth label is
    ignored."""
    M, V, K = (SHAPES | PIECES)[shape]
    hidden = gaussian(M, K, dtype=dtype)
    weight = (3 * gaussian(V, K, seed=1) / K**0.5).to(weight_dtype or dtype)
    labels = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(2))
    labels[3::5] = -100
    return hidden, weight, labels, gaussian(V, seed=3) if bias else None
