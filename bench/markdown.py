"""Markdown tables, and generated parts of pages between markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are padded to equal width, so that its source is readable."""
    rows = [header, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rendered = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([rendered[0], rule, *rendered[1:]])


def replace_marked(page: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between the lines `begin` and `end` of a page.

    Empty lines separate the text from both, because Markdown takes a line below a table for one of its rows.
    Raises ValueError if the page lacks one of the marks, so that no other part of it is lost.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"replace_marked: {page} must hold the lines {begin!r} and {end!r}, got a page without them")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
