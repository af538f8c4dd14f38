"""Rows of the check, one JSON object on a line of rows.jsonl. A row is on disk before the next measurement begins."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]

DEVICE = "cuda"
"""Device of the steps' tensors; the tests run the steps on the CPU."""


class Rows:
    """Appends rows of one step to DIR/rows.jsonl."""

    def __init__(self, folder: Path, step: str) -> None:
        self.path, self.step = folder / "rows.jsonl", step

    def add(self, **fields: Any) -> None:
        """Append one row and print it."""
        line = json.dumps({"step": self.step} | fields)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def read(folder: Path) -> list[Row]:
    """Return all rows of a folder so far, without an incomplete last line of a killed step."""
    path = folder / "rows.jsonl"
    found: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def step_arguments(description: str | None) -> argparse.Namespace:
    """Return the arguments of every step: --out DIR, --backend NAME, --path NAME, --tiny."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--path", default="", help="a path of routing.ON_REQUEST, which other steps leave out")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: a rehearsal of the code")
    return parser.parse_args()
