"""A target, the machines that it is about, and its verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..row_file import Row
from .formulas import Formula


@dataclass(frozen=True)
class Machine:
    """A kind of processor.   sets: the instruction sets that the kernels choose there; None for every machine."""

    words: str
    sets: tuple[str, ...] | None

    def has(self, row: Row) -> bool:
        """Whether a row is of such a machine. Rows of a forced instruction set are not: only ours is limited to it."""
        return self.sets is None or (row["isa"] in self.sets and row["forced_isa"] is None)


EVERY_MACHINE = Machine("every machine", None)
AMX = Machine("AMX", ("amx_bf16",))
AVX512_BF16 = Machine("AVX512-BF16", ("avx512_bf16",))
AVX2 = Machine("AVX2", ("avx2",))
FMA = Machine("fp32 FMA as the fastest unit", ("avx512_bf16_fma", "avx512", "avx2"))


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The keyword arguments of a Target.

    at_least, at_most: the threshold; exactly one is set.   machine: the machines that the target is about.
    stretch: the target is desired but not promised.
    """

    machine: Machine
    at_least: float | None = None
    at_most: float | None = None
    contender: str = "ours"
    stretch: bool = False

    def keeps(self, value: float) -> bool:
        """Whether the threshold is kept."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Target(Bound):
    """One performance target.   where: the rows of the op, the contender and the machine that it applies to."""

    name: str
    op: str
    formula: Formula
    where: Callable[[Row], bool] = lambda row: True

    def applies(self, row: Row) -> bool:
        """Whether the target is about a row."""
        of_contender = (row["op"], row["contender"]) == (self.op, self.contender)
        return of_contender and self.machine.has(row) and self.where(row)


@dataclass(frozen=True)
class Verdict:
    """A target and the rows on which it was measured, worst first."""

    target: Target
    measured: tuple[tuple[Row, float], ...]

    @property
    def status(self) -> str:
        """Return "met", "missed" or "not measured"."""
        if not self.measured:
            return "not measured"
        return "met" if all(self.target.keeps(value) for _, value in self.measured) else "missed"

    @property
    def kept(self) -> int:
        """Return the number of rows that keep the threshold."""
        return sum(self.target.keeps(value) for _, value in self.measured)

    @property
    def reachable(self) -> int:
        """Return the number of rows that would keep the threshold at the roofline's time; the others cannot keep it."""
        return sum(self.target.keeps(self._at_roofline(row, value)) for row, value in self.measured)

    def _at_roofline(self, row: Row, value: float) -> float:
        faster = 1 / min(row["roofline"], 1.0)
        at_roofline: float = value / faster if self.target.at_least is None else value * faster
        return at_roofline
