"""The dropout mask on the device, with the same bits as ops/philox.py, computed where it is used."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...ops.philox import ROUNDS, keep_scale, keep_threshold

PHILOX_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def keep_tile(
    seed, threshold, i_row, i_column, columns, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return int1 [ROWS, COLUMNS]: the kept elements of the tile at (i_row, i_column) of a matrix [.., columns].

    Element i = row * columns + column uses 16 bits of the Philox call i // 8.
    DROPOUT == 8: columns and i_column are multiples of 8, so that one call gives the bits of eight neighbours, and
    joins expand a row of calls to a row of draws.
    DROPOUT == 1: each element makes its own call and selects its bits; correct for any shape, with eight times the
    work.
    seed: int64.   threshold: elements with a draw below it are dropped.
    """
    rows = (i_row + tl.arange(0, ROWS)).to(tl.int64)
    if DROPOUT == 8:
        first = rows[:, None] * (columns // 8) + i_column // 8
        draws = _draws_of_calls(seed, first + tl.arange(0, COLUMNS // 8)[None, :], ROWS, COLUMNS)
    else:
        o_element = rows[:, None] * columns + (i_column + tl.arange(0, COLUMNS))[None, :]
        word0, word1, word2, word3 = _philox(seed, o_element >> 3)
        i_word = (o_element >> 1) & 3
        word = tl.where(i_word < 2, tl.where(i_word == 0, word0, word1), tl.where(i_word == 2, word2, word3))
        draws = tl.where((o_element & 1) == 0, word & 0xFFFF, word >> 16).to(tl.int32)
    return draws >= threshold


@triton.jit
def _draws_of_calls(seed, calls, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    word0, word1, word2, word3 = _philox(seed, calls)
    # join appends an axis: [.., a, b] = word (2 * a + b), so that the row-major order is word 0, 1, 2, 3.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (ROWS, COLUMNS)).to(tl.int32)


@triton.jit
def _philox(seed, counter):
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero, n_rounds=PHILOX_ROUNDS)


class DropoutRate(NamedTuple):
    """The numbers of dropout in a launch. threshold: 0 without dropout."""

    threshold: int
    scale: float

    def elements_per_philox_call(self, columns: int) -> int:
        """Return the kernels' DROPOUT for a matrix of this width: 0 without dropout, else elements per Philox call."""
        if not self.threshold:
            return 0
        return 8 if columns % 8 == 0 else 1


NO_DROPOUT = DropoutRate(0, 1.0)


class Dropout(NamedTuple):
    """The dropout arguments of a call. seed: int64 [1]; without dropout any tensor, which is not read."""

    on: bool
    seed: Tensor
    rate: DropoutRate


def dropout_of(seed: Tensor | None, dropout_p: float, placeholder: Tensor) -> Dropout:
    """Return the Dropout of an op's arguments; a probability that rounds to threshold 0 is no dropout."""
    rate = NO_DROPOUT if seed is None else rate_of(dropout_p)
    return Dropout(False, placeholder, rate) if seed is None or not rate.threshold else Dropout(True, seed, rate)


def rate_of(dropout_p: float) -> DropoutRate:
    """Return the threshold and the scale of a probability."""
    threshold = keep_threshold(dropout_p)
    return DropoutRate(threshold, float(keep_scale(dropout_p))) if threshold else NO_DROPOUT
