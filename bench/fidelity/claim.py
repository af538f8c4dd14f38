"""The definition of a claim: a paper's statement, the measured cases, a table and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..row_file import Row

PAPERS = {
    "QLoRA": "2305.14314",
    "AF4": "2306.06965",
    "LoRA": "2106.09685",
    "DoRA": "2402.09353",
    "rsLoRA": "2312.03732",
    "LoftQ": "2310.08659",
    "PiSSA": "2404.02948",
    "AdaLoRA": "2303.10512",
    "BitFit": "2106.10199",
    "Adapters": "1902.00751",
    "Prefix tuning": "2101.00190",
    "P-Tuning v2": "2110.07602",
}
"""Short name of a paper -> its number on arXiv."""


@dataclass(frozen=True)
class Finding:
    """One statement of a paper and the result.

    paper: a name in PAPERS.   statement: what the paper says, a sentence without its full stop.
    holds: whether the rows agree with the statement; None if they cannot decide it.
    measured: the numbers that decided, in words.
    """

    paper: str
    statement: str
    holds: bool | None
    measured: str

    @property
    def verdict(self) -> str:
        """Return the word for the tables."""
        return {True: "holds", False: "does not hold here", None: "not decided here"}[self.holds]


@dataclass(frozen=True)
class Claim:
    """A claim, one module of this package.

    name: its name on the command line.   title: heading of its part of the page.
    source: papers, with section or table.   method: how the claim is checked, a paragraph in Markdown.
    cases: quick -> the identifying fields of every row. A quick case is tiny and needs no downloaded weights.
    measure: (cases, quick) -> one row for each case, in order: its identifying fields and the results.
    table: rows -> Markdown.   judge: rows -> findings. Neither is called without rows.
    """

    name: str
    title: str
    source: str
    method: str
    cases: Callable[[bool], Sequence[Row]]
    measure: Callable[[Sequence[Row], bool], Iterator[Row]]
    table: Callable[[Sequence[Row]], str]
    judge: Callable[[Sequence[Row]], Sequence[Finding]]


def has_case(row: Row, case: Row) -> bool:
    """Whether a row is the measurement of a case, with equal values of all the case's fields."""
    return all(name in row and row[name] == value for name, value in case.items())


def find(rows: Sequence[Row], **fields: object) -> Row | None:
    """Return the last row with these fields, or None."""
    return next((row for row in reversed(rows) if has_case(row, fields)), None)
