"""The performance targets of the kernels: ratios of numbers that were measured in one run.

Each target names the machines that it is about, or every machine. A target is met if every row that it applies to keeps
its threshold; the worst row decides. docs/notebook/missed-targets.md lists the measured causes of missed targets.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..row_file import Row
from . import amx, avx512_bf16, every_machine, fma
from .target import Target, Verdict

TARGETS: tuple[Target, ...] = (
    *every_machine.TARGETS,
    *avx512_bf16.TARGETS,
    *amx.TARGETS,
    *fma.TARGETS,
)


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Return every target's verdict over rows with a correct result and a time."""
    timed = [row for row in rows if "median_us" in row]
    verdicts = []
    for target in TARGETS:
        values = [(row, target.formula.of(row)) for row in timed if target.applies(row)]
        measured = [(row, value) for row, value in values if value is not None]
        measured.sort(key=lambda pair: pair[1], reverse=target.at_least is None)
        verdicts.append(Verdict(target, tuple(measured)))
    return verdicts


__all__ = ["TARGETS", "Target", "Verdict", "judge"]
