"""What the kernels are meant to reach, as ratios of numbers measured in one run, and why where they do not.

A target holds where its formula, taken of each row that it is about, keeps the threshold; the worst row decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Formula:
    """A number that a row gives, or None where it does not."""

    words: str
    of: Callable[[Row], float | None]


def speedup_over(peer: str) -> Formula:
    """The peer's median over ours."""
    return Formula(f"time of {peer} / ours", lambda row: row["speedup"].get(peer))


def time_of(peer: str) -> Formula:
    """Our median over the peer's."""
    return Formula(f"our time / {peer}", lambda row: 1 / row["speedup"][peer] if peer in row["speedup"] else None)


def fraction_of(peak: str) -> Formula:
    """Share of a measured peak."""
    return Formula(f"share of {peak} peak", lambda row: row["fraction"].get(peak))


@dataclass(frozen=True)
class Target:
    """One promise. at_least or at_most: the threshold.   stretch: wanted, not promised.   cause: shown where missed."""

    name: str
    op: str
    formula: Formula
    where: Callable[[Row], bool] = lambda row: True
    at_least: float | None = None
    at_most: float | None = None
    contender: str = "ours"
    stretch: bool = False
    cause: str = ""

    def keeps(self, value: float) -> bool:
        """Whether the threshold is kept."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Verdict:
    """A target and the rows it was measured on, worst first."""

    target: Target
    measured: tuple[tuple[Row, float], ...]

    @property
    def status(self) -> str:
        """met, missed, or not measured."""
        if not self.measured:
            return "not measured"
        return "met" if all(self.target.keeps(value) for _, value in self.measured) else "missed"

    @property
    def kept(self) -> int:
        """Rows that keep the threshold."""
        return sum(self.target.keeps(value) for _, value in self.measured)

    @property
    def reachable(self) -> int:
        """Rows that would keep the threshold if our time were the roofline's: in the others it lies beyond."""
        return sum(self.target.keeps(self._at_roofline(row, value)) for row, value in self.measured)

    def _at_roofline(self, row: Row, value: float) -> float:
        faster = 1 / min(row["roofline"], 1.0)
        return value / faster if self.target.at_least is None else value * faster


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Every target's verdict over green rows with a time."""
    timed = [row for row in rows if "median_us" in row]
    verdicts = []
    for target in TARGETS:
        about = [row for row in timed if (row["op"], row["contender"]) == (target.op, target.contender)]
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


def _whole_model(row: Row) -> bool:
    return bool(row["M"] == 1024)


_BEYOND_ROOFLINE = (
    "on two Zen 4 cores the products alone, at the measured vdpbf16ps peak, leave room for 1.2 to 1.4 times over "
    "bitsandbytes at 4096x4096 and M 1024: there the bound is beyond the roofline."
)

_DISPATCH = (
    "on layers of 576 a call's fixed costs (20 us: module, dispatcher, a Python kernel, the native call) and the "
    "second thread's wake-up take longer than the weight's bytes (6 us)"
)

_SMALL_M = (
    "decoding 64 weights takes 6.5 cycles and their products 2 for each token, against 7 to 8 cycles for reading their "
    "bytes: from M 4 on arithmetic takes longer than memory; " + _DISPATCH + "."
)

_BNB_EVAL = (
    "bitsandbytes decodes the 8-bit constants once, rounds them to bf16 and keeps a repacked copy; ours are decoded "
    "from the stored bytes in each call, exactly; and " + _DISPATCH + "."
)

_PANELS = (
    "natively the product runs at 89 to 96 % of peak on every shape (docs/kernels.md). Decoding W, which oneDNN does "
    "not, takes up to 8 %; on layers of 576 and 1536 the call itself and fresh pages of y take as much again."
)

_TRAINING_SMALL = (
    "bitsandbytes decodes once and multiplies with oneDNN: from M 512 on its decode is a tenth to a third of its time, "
    "and 1.3 times over it would be more than dense without any decode."
)

_DEQUANTIZE = (
    "an ordinary store reads the line it overwrites, 4.5 bytes moved for 2.5 counted (56 %) where the output leaves "
    "the cache; streaming stores were faster in fp32 and slower in bf16 (docs/kernels.md), and were not kept. Small "
    "layers: of 26 us a call 12 are its fixed costs."
)

_QUANTIZE = (
    "the kernel alone takes 45 cycles for 64 fp32 weights, whose bytes take 53 to copy, and 37 for bf16, whose bytes "
    "take 30 (docs/kernels.md); the second level and its mean add 100 us to 2300 at 4096x4096, and fresh outputs' "
    "pages up to as much again where malloc has none to hand back."
)

_ADAMW_FP32 = (
    "one tensor of 160M: both run at the speed of a copy (ours at 99 % of it), and the machine's memory changes its "
    "speed from one minute to the next; an earlier run had 1.04."
)

_ADAMW_8BIT = (
    "encoding both states takes 42 instructions for 16 elements, decoding 22, the update 17: 70 cycles, where copying "
    "their bytes takes 47 (docs/kernels.md). The states are a quarter of torch's."
)

_LORA_SMALL = (
    "at 576 the low-rank products alone are 1.08 times the plain layer's flops, at a lower rate (docs/kernels.md), and "
    "a dropout mask another 0.05; of 220 us more at M 256 some 56 are the calls' fixed costs. At 4096 "
    "the bound is kept."
)

_STEP = (
    "attention, norms, activations and residuals, the same for all contenders, take 0.9 of the profiled 2.8 s, and the "
    "flops of adapted linears and head 1.25 s at peak: at the roofline the step would run at 1.8 times the "
    "peers' speed (above)."
)


TARGETS = (
    Target("quantize + double quantize", "quantize_nf4", speedup_over("bnb"), at_least=40, cause=_QUANTIZE),
    Target(
        "quantize fp32, bandwidth",
        "quantize_nf4",
        fraction_of("copy"),
        lambda row: not _bf16(row) and row["N"] >= 4096,
        at_least=0.6,
        stretch=True,
        cause=_QUANTIZE,
    ),
    Target("dequantize into reused output", "dequantize_nf4", fraction_of("copy"), at_least=0.8, cause=_DEQUANTIZE),
    Target(
        "forward M 1..8 cold, bandwidth",
        "linear_nf4",
        fraction_of("read"),
        _rows(1, 8, mode="cold"),
        at_least=0.8,
        cause=_SMALL_M,
    ),
    Target(
        "forward M 1..8 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        _rows(1, 8),
        at_least=1.3,
        cause=_BNB_EVAL,
    ),
    Target(
        "forward M 1 cold over dense",
        "linear_nf4",
        speedup_over("dense"),
        _rows(1, 1, mode="cold"),
        at_least=3.5,
        cause=_DISPATCH,
    ),
    Target(
        "forward M 16..128 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        _rows(9, 255),
        at_least=1.0,
        cause=_BNB_EVAL,
    ),
    Target("forward M 16..128 over bnb train", "linear_nf4", speedup_over("bnb train"), _rows(9, 255), at_least=1.0),
    Target(
        "forward M 16..128 over dense", "linear_nf4", speedup_over("dense"), _rows(9, 255), at_least=0.9, cause=_PANELS
    ),
    Target(
        "forward M >= 256, arithmetic", "linear_nf4", fraction_of("bf16_dot"), _rows(256), at_least=0.85, cause=_PANELS
    ),
    Target("forward M >= 256 over dense", "linear_nf4", speedup_over("dense"), _rows(256), at_least=1.0, cause=_PANELS),
    Target(
        "forward M >= 256 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        _rows(256),
        at_least=1.25,
        cause=_PANELS,
    ),
    Target(
        "forward M >= 256 over bnb train",
        "linear_nf4",
        speedup_over("bnb train"),
        _rows(256),
        at_least=1.3,
        cause=_TRAINING_SMALL,
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
        cause=_BEYOND_ROOFLINE,
    ),
    Target(
        "LoRA forward + backward over bnb + PEFT",
        "linear_nf4_lora",
        speedup_over("bnb + PEFT"),
        at_least=2.5,
        cause=_BEYOND_ROOFLINE,
    ),
    Target(
        "LoRA beside our plain layer", "linear_nf4_lora", time_of("ours without LoRA"), at_most=1.10, cause=_LORA_SMALL
    ),
    Target("AdamW step, fp32 states, bandwidth", "adamw_step", fraction_of("copy"), _beyond_cache, at_least=0.8),
    Target(
        "AdamW step, fp32 states, over torch",
        "adamw_step",
        speedup_over("torch"),
        at_least=1.0,
        cause=_ADAMW_FP32,
    ),
    Target(
        "AdamW step, 8-bit states, bandwidth",
        "adamw_step",
        fraction_of("copy"),
        _beyond_cache,
        at_least=0.8,
        contender="ours 8-bit",
        cause=_ADAMW_8BIT,
    ),
    Target(
        "AdamW step, 8-bit states, over torch",
        "adamw_step",
        speedup_over("torch"),
        at_least=1.0,
        contender="ours 8-bit",
        cause=_ADAMW_8BIT,
    ),
    Target(
        "training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _whole_model,
        at_least=1.8,
        cause=_STEP,
    ),
    Target(
        "training step over dense + PEFT",
        "train_step",
        speedup_over("dense + PEFT"),
        _whole_model,
        at_least=1.8,
        cause=_STEP,
    ),
    Target(
        "training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        _whole_model,
        at_least=2.5,
        stretch=True,
    ),
)
