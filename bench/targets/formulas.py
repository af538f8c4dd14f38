"""The numbers of a row that targets bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..row_file import Row


@dataclass(frozen=True)
class Formula:
    """A number computed from a row, or None if the row does not have it."""

    words: str
    of: Callable[[Row], float | None]


def speedup_over(peer: str) -> Formula:
    """Return the formula: the peer's median over ours."""
    return Formula(f"time of {peer} / ours", lambda row: row["speedup"].get(peer))


def time_of(peer: str) -> Formula:
    """Return the formula: our median over the peer's."""
    return Formula(f"our time / {peer}", lambda row: 1 / row["speedup"][peer] if peer in row["speedup"] else None)


def fraction_of(peak: str) -> Formula:
    """Return the formula: the share of a measured peak."""
    return Formula(f"share of {peak} peak", lambda row: row["fraction"].get(peak))


def memory_beside(peer: str) -> Formula:
    """Return the formula: our peak memory over the peer's."""
    return Formula(f"our peak memory / {peer}", lambda row: row.get("memory_ratio", {}).get(peer))
