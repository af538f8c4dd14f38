"""The performance targets of the kernels: ratios of numbers that were measured in one run.

A target is met if every row that it applies to keeps its threshold; the worst row decides.
docs/notebook/missed-targets.md lists the measured causes of missed targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .row_file import Row


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


@dataclass(frozen=True)
class Machine:
    """A kind of processor.   isa: the instruction set that the kernels use there."""

    words: str
    isa: str


AMX = Machine("AMX", "amx_bf16")
AVX512_BF16 = Machine("AVX512-BF16", "avx512_bf16")


@dataclass(frozen=True)
class Target:
    """One performance target.

    at_least, at_most: the threshold; exactly one is set.   where: the rows that the target applies to.
    machine: the machines that the target is about.   stretch: the target is desired but not promised.
    """

    name: str
    op: str
    formula: Formula
    where: Callable[[Row], bool] = lambda row: True
    at_least: float | None = None
    at_most: float | None = None
    contender: str = "ours"
    machine: Machine | None = None
    stretch: bool = False

    def keeps(self, value: float) -> bool:
        """Whether the threshold is kept."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


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


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Return every target's verdict over rows with a correct result and a time."""
    timed = [row for row in rows if "median_us" in row]
    verdicts = []
    for target in TARGETS:
        about = [row for row in timed if (row["op"], row["contender"]) == (target.op, target.contender)]
        if target.machine is not None:
            about = [row for row in about if row["isa"] == target.machine.isa]
        values = [(row, target.formula.of(row)) for row in about if target.where(row)]
        measured = [(row, value) for row, value in values if value is not None]
        measured.sort(key=lambda pair: pair[1], reverse=target.at_least is None)
        verdicts.append(Verdict(target, tuple(measured)))
    return verdicts


def _bf16(row: Row) -> bool:
    return bool(row["dtype"] == "bfloat16")


def _rows(low: int, high: int = 1 << 30, *, mode: str | None = None) -> Callable[[Row], bool]:
    return lambda row: _bf16(row) and low <= row["M"] <= high and mode in (None, row["mode"])


def _beyond_cache(row: Row) -> bool:
    return bool(row["N"] > 10_000_000)


def _large(low: int, high: int = 1 << 30) -> Callable[[Row], bool]:
    return lambda row: _bf16(row) and low <= row["M"] <= high and max(row["N"], row["K"]) >= 4096


def _small(row: Row) -> bool:
    return _bf16(row) and max(row["N"], row["K"]) < 4096


def _model(label: str) -> Callable[[Row], bool]:
    return lambda row: str(row["case"]).startswith(label)


_whole_model = _model("SmolLM2-135M")


TARGETS = (
    Target("quantize + double quantize", "quantize_nf4", speedup_over("bnb"), at_least=40),
    Target(
        "quantize fp32, bandwidth",
        "quantize_nf4",
        fraction_of("copy"),
        lambda row: not _bf16(row) and row["N"] >= 4096,
        at_least=0.6,
        stretch=True,
    ),
    Target("dequantize into reused output", "dequantize_nf4", fraction_of("copy"), at_least=0.8),
    Target("forward M 1..8 cold, bandwidth", "linear_nf4", fraction_of("read"), _rows(1, 8, mode="cold"), at_least=0.8),
    Target(
        "forward M 1..8 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        _rows(1, 8),
        at_least=1.3,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M 1 cold over dense",
        "linear_nf4",
        speedup_over("dense"),
        _rows(1, 1, mode="cold"),
        at_least=3.5,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M 16..128 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        _rows(9, 255),
        at_least=1.0,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M 16..128 over bnb train",
        "linear_nf4",
        speedup_over("bnb train"),
        _rows(9, 255),
        at_least=1.0,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M 16..128 over dense",
        "linear_nf4",
        speedup_over("dense"),
        _rows(9, 255),
        at_least=0.9,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M >= 256, arithmetic",
        "linear_nf4",
        fraction_of("bf16"),
        _rows(256),
        at_least=0.85,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M >= 256 over dense",
        "linear_nf4",
        speedup_over("dense"),
        _rows(256),
        at_least=1.0,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M >= 256 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        _rows(256),
        at_least=1.25,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M >= 256 over bnb train",
        "linear_nf4",
        speedup_over("bnb train"),
        _rows(256),
        at_least=1.3,
        machine=AVX512_BF16,
    ),
    Target("1 -> 2 threads at M 256", "linear_nf4", speedup_over("ours, 1 thread"), _rows(256, 256), at_least=1.8),
    Target(
        "AVX2 and AVX-512 without BF16, fp32 M 256",
        "linear_nf4",
        fraction_of("fma"),
        lambda row: row["forced_isa"] in ("avx2", "avx512"),
        at_least=0.75,
    ),
    Target(
        "forward + grad_x M 1024 over bnb train",
        "linear_nf4_grad_x",
        speedup_over("bnb train"),
        _rows(1024),
        at_least=2.0,
        machine=AVX512_BF16,
    ),
    Target(
        "LoRA forward + backward over bnb + PEFT",
        "linear_nf4_lora",
        speedup_over("bnb + PEFT"),
        at_least=2.5,
        machine=AVX512_BF16,
    ),
    Target(
        "LoRA beside our plain layer",
        "linear_nf4_lora",
        time_of("ours without LoRA"),
        at_most=1.10,
        machine=AVX512_BF16,
    ),
    Target("AdamW step, fp32 states, bandwidth", "adamw_step", fraction_of("copy"), _beyond_cache, at_least=0.8),
    Target("AdamW step, fp32 states, over torch", "adamw_step", speedup_over("torch"), at_least=1.0),
    Target(
        "AdamW step, 8-bit states, bandwidth",
        "adamw_step",
        fraction_of("copy"),
        _beyond_cache,
        at_least=0.8,
        contender="ours 8-bit",
    ),
    Target(
        "AdamW step, 8-bit states, over torch",
        "adamw_step",
        speedup_over("torch"),
        at_least=1.0,
        contender="ours 8-bit",
    ),
    Target(
        "training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _whole_model,
        at_least=1.8,
        machine=AVX512_BF16,
    ),
    Target(
        "training step over dense + PEFT",
        "train_step",
        speedup_over("dense + PEFT"),
        _whole_model,
        at_least=1.8,
        machine=AVX512_BF16,
    ),
    Target(
        "training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _whole_model,
        at_least=2.5,
        stretch=True,
        machine=AVX512_BF16,
    ),
    Target(
        "fused training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _whole_model,
        at_least=1.8,
        contender="ours, fused",
        machine=AVX512_BF16,
    ),
    Target(
        "AMX: fused training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _model("SmolLM2-135M"),
        at_least=2.2,
        contender="ours, fused",
        machine=AMX,
    ),
    Target(
        "AMX: fused training step over dense + PEFT",
        "train_step",
        speedup_over("dense + PEFT"),
        _model("SmolLM2-135M"),
        at_least=2.0,
        contender="ours, fused",
        machine=AMX,
    ),
    Target(
        "AMX: 1B fused training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _model("llama-1b"),
        at_least=1.8,
        contender="ours, fused",
        machine=AMX,
    ),
    Target(
        "AMX: loss of an evaluation over dense logits",
        "evaluate",
        speedup_over("dense"),
        _model("SmolLM2-135M"),
        at_least=4.0,
        contender="ours, fused",
        machine=AMX,
    ),
    Target(
        "AMX: forward M 1..64 over dense", "linear_nf4", speedup_over("dense"), _large(1, 64), at_least=2.0, machine=AMX
    ),
    Target(
        "AMX: forward M 128..512 over dense",
        "linear_nf4",
        speedup_over("dense"),
        _large(128, 512),
        at_least=1.5,
        machine=AMX,
    ),
    Target(
        "AMX: forward M 1024, 4096 over dense",
        "linear_nf4",
        speedup_over("dense"),
        _large(1024),
        at_least=1.4,
        machine=AMX,
    ),
    Target(
        "AMX: forward on small layers over dense",
        "linear_nf4",
        speedup_over("dense"),
        _small,
        at_least=1.0,
        machine=AMX,
    ),
    Target("AMX: forward + grad_x over dense", "linear_nf4_grad_x", speedup_over("dense"), at_least=1.15, machine=AMX),
    Target(
        "AMX: LoRA beside our plain layer", "linear_nf4_lora", time_of("ours without LoRA"), at_most=1.06, machine=AMX
    ),
    Target(
        "AMX: training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _model("SmolLM2-135M"),
        at_least=1.3,
        machine=AMX,
    ),
    Target(
        "AMX: 1B training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _model("llama-1b"),
        at_least=1.5,
        machine=AMX,
    ),
    Target(
        "AMX: 1B training step over dense + PEFT",
        "train_step",
        speedup_over("dense + PEFT"),
        _model("llama-1b"),
        at_least=1.5,
        machine=AMX,
    ),
    Target("1B training step, peak memory", "train_step", memory_beside("bnb + PEFT"), _model("llama-1b"), at_most=0.6),
    Target(
        "AMX: 1B prefill over dense",
        "generate",
        speedup_over("dense"),
        lambda row: row["M"] > 1,
        at_least=1.3,
        machine=AMX,
    ),
    Target(
        "AMX: 1B decoding over bnb",
        "generate",
        speedup_over("bnb"),
        lambda row: row["M"] == 1,
        at_least=1.2,
        machine=AMX,
    ),
)
