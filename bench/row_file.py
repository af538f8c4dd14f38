"""Files of benchmark rows: JSON lines, in which the provenance of a group of rows precedes the group.

    {"provenance": {"time": ..., "device": ..., "machine": ..., "isa": ..., "commit": ..., "versions": {...}}}
    {"op": "linear_nf4", "case": ...}
    {"op": "linear_nf4", "case": ...}

In memory, every row has its provenance as fields, so that rows of several files can be mixed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]

PROVENANCE = ("time", "device", "machine", "isa", "commit", "versions")
"""Fields that are equal in all rows of one run on one instruction set."""


class RowWriter:
    """Writes rows to an open text file, and a provenance line whenever the provenance changes."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self._provenance: Row | None = None

    def write(self, row: Row) -> None:
        """Append one row to the file."""
        provenance = {name: row[name] for name in PROVENANCE if name in row}
        if provenance != self._provenance:
            self.file.write(json.dumps({"provenance": provenance}) + "\n")
            self._provenance = provenance
        self.file.write(json.dumps({name: value for name, value in row.items() if name not in PROVENANCE}) + "\n")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, each with the provenance fields of its group.

    Rows before the first provenance line are yielded unchanged; `bench.run --json` prints such lines.
    """
    provenance: Row = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "provenance" in row:
            provenance = row["provenance"]
        else:
            yield row | provenance


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the contents of the file by these rows."""
    with path.open("w", encoding="utf-8") as file:
        writer = RowWriter(file)
        for row in rows:
            writer.write(row)
