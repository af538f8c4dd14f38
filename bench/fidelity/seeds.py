"""Differences of two variants over their common seeds, and what they decide."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..row_file import Row
from .claim import has_case

RULE = (
    "A difference counts where it exceeds two standard errors of its mean over the seeds, and is not decided "
    "otherwise; with three seeds chance alone passes this in 18 % of all cases, with two seeds in 30 %. Two variants "
    "count as equal only over three seeds or more."
)
"""How Differences decide, a sentence for the page."""


@dataclass(frozen=True)
class Differences:
    """Differences of one result between two variants, one for each seed that has both."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean over the seeds. Raises statistics.StatisticsError without seeds."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float | None:
        """Return the standard deviation over the seeds, or None for fewer than two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """Return two standard errors of the mean, or None for fewer than two seeds."""
        return None if self.spread is None else 2 * self.spread / len(self.values) ** 0.5

    def is_below_zero(self) -> bool | None:
        """Whether the mean is below zero by more than the error; False if it is above by more; None between."""
        if self.error is None or abs(self.mean) <= self.error:
            return None
        return self.mean < 0

    def is_at_most(self, tolerance: float) -> bool | None:
        """Whether the mean plus the error is at most the tolerance, over three seeds or more, because two may be equal
        by chance; False if the mean is above zero by more than the error; None if neither is so.
        """
        if self.error is None:
            return None
        if self.mean > self.error:
            return False
        return True if len(self.values) > 2 and self.mean + self.error <= tolerance else None

    def words(self, decimals: int) -> str:
        """Return mean, number of seeds and standard deviation in words."""
        seeds = f"{len(self.values)} seed{'s' if len(self.values) > 1 else ''}"
        spread = "" if self.spread is None else f", standard deviation {self.spread:.{decimals}f}"
        return f"{self.mean:+.{decimals}f} over {seeds}{spread}"


def differences(rows: Sequence[Row], result: str, first: Row, second: Row) -> Differences | None:
    """Return `result` of `first` minus that of `second` for each seed that has both, or None if no seed has both.

    first, second: the fields that identify the rows of a variant.
    """
    results = [{row["seed"]: row[result] for row in rows if has_case(row, variant)} for variant in (first, second)]
    seeds = sorted(results[0].keys() & results[1].keys())
    return Differences(tuple(results[0][seed] - results[1][seed] for seed in seeds)) if seeds else None


def mean_and_spread(values: Sequence[float], decimals: int) -> str:
    """Return "mean ± standard deviation", or the value alone for one seed."""
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}"
