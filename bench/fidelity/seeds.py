"""Differences of two variants over their common seeds, and what they decide."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..row_file import Row
from .claim import has_case

RULE = (
    "A difference counts where the 95 % interval of its mean over the seeds (Student's t) excludes zero, and is not "
    "decided otherwise; with two seeds it must be nine times its standard deviation, with three 2.5 times. Two "
    "variants count as equal only over three seeds or more."
)
"""How Differences decide, a sentence for the page."""


STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Number of seeds -> 97.5 % quantile of Student's t distribution with one degree of freedom less."""


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
        """Return half of the mean's 95 % interval, or None for one seed. Raises KeyError for more than five."""
        return None if self.spread is None else STUDENT_T[len(self.values)] * self.spread / len(self.values) ** 0.5

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
        """Return mean, number of seeds and 95 % interval in words."""
        if self.error is None:
            return f"{self.mean:+.{decimals}f} with one seed"
        low, high = self.mean - self.error, self.mean + self.error
        interval = f"95 % interval {low:+.{decimals}f} to {high:+.{decimals}f}"
        return f"{self.mean:+.{decimals}f} over {len(self.values)} seeds, {interval}"


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
