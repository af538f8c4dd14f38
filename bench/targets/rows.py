"""The rows that targets apply to."""

from __future__ import annotations

from collections.abc import Callable

from ..row_file import Row


def is_bf16(row: Row) -> bool:
    """Whether x of the row is bf16."""
    return bool(row["dtype"] == "bfloat16")


def rows(low: int, high: int = 1 << 30, *, mode: str | None = None) -> Callable[[Row], bool]:
    """Return the condition: bf16, M from `low` to `high`, and the mode if it is given."""
    return lambda row: is_bf16(row) and low <= row["M"] <= high and mode in (None, row["mode"])


def from_tokens(low: int, dtype: str) -> Callable[[Row], bool]:
    """Return the condition: x of a dtype with at least `low` tokens."""
    return lambda row: bool(row["dtype"] == dtype and row["M"] >= low)


def beyond_cache(row: Row) -> bool:
    """Whether an optimizer step is over more elements than any cache holds."""
    return bool(row["N"] > 10_000_000)


def large(low: int, high: int = 1 << 30) -> Callable[[Row], bool]:
    """Return the condition: bf16, M from `low` to `high`, on the layer of a large model."""
    return lambda row: is_bf16(row) and low <= row["M"] <= high and max(row["N"], row["K"]) >= 4096


def small(row: Row) -> bool:
    """Whether the row is bf16 on the layer of a small model."""
    return is_bf16(row) and max(row["N"], row["K"]) < 4096


def model(label: str) -> Callable[[Row], bool]:
    """Return the condition: the case is one of the model `label`."""
    return lambda row: str(row["case"]).startswith(label)
