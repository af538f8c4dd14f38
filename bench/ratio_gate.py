"""`make bench-gate`: compares the headline ratios of ours to each peer, measured now, with the committed ones.

Both sides of a ratio are measured alternately in one process, so that a slower machine does not fail the gate. On a
machine with another instruction set than the committed rows, nothing is compared. A failing case is measured a second
time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .machine import cpu_isa
from .report import committed_files
from .row_file import Row, read_rows
from .run import run
from .timing import Budget

SLACK = 0.75
"""Share of the committed ratio that a measured one must reach: ratios of single runs differ by up to a sixth."""

HEADLINES = (
    ("quantize_nf4", "4096x4096 bf16", "cold"),
    ("dequantize_nf4", "4096x4096 bf16", "cold"),
    ("linear_nf4", "4096x4096 M1 bf16", "cold"),
    ("linear_nf4", "4096x4096 M64 bf16", "cold"),
    ("linear_nf4", "4096x4096 M1024 bf16", "cold"),
    ("linear_nf4_lora", "4096x4096 M256 r16 bf16", "cold"),
    ("adamw_step", "1.11M 120 tensors fp32", "cold"),
)
"""(op, case, mode) of the measurements that README and docs/benchmarks.md are based on."""


@dataclass(frozen=True)
class Ratio:
    """The speedup of ours over a peer, as committed and as measured now; None if it was not measured."""

    name: str
    committed: float
    measured: float | None

    @property
    def kept(self) -> bool:
        """Whether the measured ratio is at least SLACK times the committed one."""
        return self.measured is not None and self.measured >= SLACK * self.committed

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"{self.measured:.2f}x"
        verdict = "kept" if self.kept else f"below {SLACK:.0%} of it"
        return f"{self.name}: {measured}, committed {self.committed:.2f}x: {verdict}"


def main() -> int:
    """Return 1 if a ratio is below its bound, 2 if there are no rows to compare with, otherwise 0."""
    isa = cpu_isa()
    committed = [row for path in committed_files() for row in read_rows(path) if row["isa"] == isa]
    if not any(row["op"] != "peak" for row in committed):
        print(f"bench-gate: no committed rows for the instruction set {isa}; nothing was compared", file=sys.stderr)
        return 2
    measured = list(run("cpu", _pattern(HEADLINES), quick=False, isa=None, budget=Budget(seconds=2.0)))
    again = {(row["op"], row["case"]) for row, ratio in compared(committed, measured) if not ratio.kept}
    if again:
        print("bench-gate: measuring once more what is below its bound", file=sys.stderr)
        cases = [headline for headline in HEADLINES if headline[:2] in again]
        fresh = list(run("cpu", _pattern(cases), quick=False, isa=None, budget=Budget(seconds=4.0)))
        measured = [row for row in measured if (row["op"], row.get("case")) not in again] + fresh
    ratios = [ratio for _, ratio in compared(committed, measured)]
    print("\n".join(map(str, ratios)))
    return int(not all(ratio.kept for ratio in ratios))


def compared(committed: Iterable[Row], measured: Sequence[Row]) -> Iterator[tuple[Row, Ratio]]:
    """Yield each headline's committed row of ours with its ratio to each peer."""
    now = {_key(row): row for row in measured if row["contender"] == "ours" and "speedup" in row}
    for row in committed:
        if row["contender"] != "ours" or _key(row) not in HEADLINES:
            continue
        for peer, ratio in row["speedup"].items():
            if not peer.startswith("ours"):
                found = now.get(_key(row), {}).get("speedup", {}).get(peer)
                yield row, Ratio(f"{' '.join(_key(row))} over {peer}", ratio, found)


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["case"], row["mode"]


def _pattern(headlines: Iterable[tuple[str, str, str]]) -> str:
    return "^(" + "|".join(re.escape(f"{op} {case}") for op, case, _ in headlines) + ")$"


if __name__ == "__main__":
    sys.exit(main())
