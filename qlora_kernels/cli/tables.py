"""Tables of results: aligned text, drawn by rich on a terminal where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence


def table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, right: Collection[int] = ()) -> str:
    """Return a table as text, without a line break at its end.

    rows: the cells of each row; not empty, all of one length.   right: numbers of the columns that are right-justified.
    """
    if sys.stdout.isatty():
        try:
            return _drawn(rows, header, right)
        except ImportError:
            pass
    lines = [list(header), *rows] if header else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = []
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def _drawn(rows: Sequence[Sequence[str]], header: Sequence[str] | None, right: Collection[int]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*(header or [""] * len(rows[0])), box=box.SIMPLE_HEAD, show_header=header is not None, pad_edge=False)
    for number, column in enumerate(drawn.columns):
        column.justify, column.overflow = "right" if number in right else "left", "fold"
    for row in rows:
        drawn.add_row(*map(Text, row))  # as Text, because brackets in a string would be read as markup
    console = Console()
    with console.capture() as captured:
        console.print(drawn)
    lines = (line.rstrip() for line in str(captured.get()).split("\n"))
    return "\n".join(line for line in lines if line)
