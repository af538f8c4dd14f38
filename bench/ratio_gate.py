"""`make bench-gate`: compares the headline ratios of ours to each peer, measured now, with the committed ones.

Both sides of a ratio are measured alternately in one process, so that a slower machine does not fail the gate. On a
machine with another instruction set than the committed rows, nothing is compared. A failing case is measured a second
time. Each case is measured only in the mode and with the peers that have committed rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .machine import cpu_isa
from .peaks import Peak
from .report import committed_files
from .row_file import Row, read_rows
from .run import run_case
from .suites import suites
from .timing import Budget

Headline = tuple[str, str, str]
"""(op, case, mode)."""

SECONDS = 2.0
"""Time for one headline, at least three rounds; building the copies of the weights takes as long again."""

SLACK = 0.75
"""Share of the committed ratio that a measured one must reach: ratios of single runs differ by up to a sixth."""

HEADLINES: tuple[Headline, ...] = (
    ("quantize_nf4", "4096x4096 bf16", "cold"),
    ("dequantize_nf4", "4096x4096 bf16", "cold"),
    ("linear_nf4", "4096x4096 M1 bf16", "cold"),
    ("linear_nf4", "4096x4096 M64 bf16", "cold"),
    ("linear_nf4", "4096x4096 M1024 bf16", "cold"),
    ("linear_nf4_lora", "4096x4096 M256 r16 bf16", "cold"),
    ("adamw_step", "1.11M 120 tensors fp32", "cold"),
)
"""The measurements that README and docs/benchmarks.md are based on."""


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
        if self.measured is None:
            return f"{self.name}: not measured, committed {self.committed:.2f}x: failed"
        verdict = "kept" if self.kept else f"below {SLACK:.0%} of it"
        return f"{self.name}: {self.measured:.2f}x, committed {self.committed:.2f}x: {verdict}"


def main() -> int:
    """Return 1 if a ratio is below its bound, 2 if there are no rows to compare with, otherwise 0."""
    isa = cpu_isa()
    committed = [row for path in committed_files() for row in read_rows(path) if row["isa"] == isa]
    if not any(_key(row) in HEADLINES for row in committed):
        print(f"bench-gate: no committed rows for the instruction set {isa}; nothing was compared", file=sys.stderr)
        return 2
    ratios = judge(committed, measure)
    if not ratios:
        print("bench-gate: no peer of the committed rows is installed; nothing was compared", file=sys.stderr)
        return 2
    print("\n".join(map(str, ratios)))
    return int(not all(ratio.kept for ratio in ratios))


def judge(committed: Sequence[Row], measure: Callable[[Headline, Sequence[Row], float], list[Row]]) -> list[Ratio]:
    """Return the ratio of ours to each peer in each headline that has committed rows.

    measure: (headline, committed rows, seconds) -> rows. A headline with a ratio below its bound is measured again, for
    twice as long.
    """
    ratios = []
    for headline in HEADLINES:
        rows = [row for row in committed if _key(row) == headline]
        if not rows:
            continue
        found = compared(rows, measure(headline, committed, SECONDS))
        if not all(ratio.kept for ratio in found):
            print("bench-gate: once more, because a ratio is below its bound", file=sys.stderr, flush=True)
            found = compared(rows, measure(headline, committed, 2 * SECONDS))
        ratios += found
    return ratios


def measure(headline: Headline, committed: Sequence[Row], seconds: float) -> list[Row]:
    """Return rows of one headline, measured in its mode, of ours and of the contenders that have committed rows."""
    op, name, mode = headline
    print(f"bench-gate: {op} {name}, {mode}", file=sys.stderr, flush=True)
    suite = suites()[op]
    (case,) = [case for case in suite.cases("cpu") if case.name == name]
    known = {row["contender"] for row in committed if _key(row) == headline}
    contenders = tuple(contender for contender in suite.contenders if contender.name in known)
    suite = replace(suite, contenders=contenders, modes=(mode,))
    return list(run_case(suite, case, committed_peaks(committed), Budget(seconds=seconds)))


def committed_peaks(committed: Sequence[Row]) -> dict[str, Peak]:
    """Return the peaks of the committed rows, because ratios to peers do not depend on them."""
    peaks = [row for row in committed if row["op"] == "peak" and row["forced_isa"] is None]
    return {row["case"]: Peak(row["case"], row["rate"] * 1e9, row["contender"]) for row in peaks}


def compared(committed: Sequence[Row], measured: Sequence[Row]) -> list[Ratio]:
    """Return the ratio of ours to each peer, from rows of one headline.

    The committed ratio is the smallest one where several rows have it, as the rows of several machines do. A peer that
    was not measured, because it is not installed or its result is wrong, is named on standard error and left out.
    """
    ours = [row for row in committed if row["contender"] == "ours" and "speedup" in row]
    found = next((row for row in measured if row["contender"] == "ours" and "speedup" in row), None)
    peers = dict.fromkeys(peer for row in ours for peer in row["speedup"] if not peer.startswith("ours"))
    ratios = []
    for peer in peers:
        if found is not None and peer not in found["speedup"]:
            print(f"bench-gate: {peer} was not measured", file=sys.stderr, flush=True)
            continue
        smallest = min(row["speedup"][peer] for row in ours if peer in row["speedup"])
        now = None if found is None else found["speedup"][peer]
        ratios.append(Ratio(f"{' '.join(_key(ours[0]))} over {peer}", smallest, now))
    return ratios


def _key(row: Row) -> Headline:
    return row["op"], row["case"], row["mode"]


if __name__ == "__main__":
    sys.exit(main())
