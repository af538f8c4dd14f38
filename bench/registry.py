"""What is measured: an op's problems, what each costs at least, who competes and how a result is checked.

bench/ops/bench_<op>.py defines a module constant SUITE, which bench/suites.py finds. This module is independent of the
device: a Case names its own, and a Contender says where it applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

GATE_SEED = 0
"""torch's seed when a call runs whose result is verified: what it draws (dropout) can be drawn again."""

COLD, WARM = "cold", "warm"
"""Cold: each call finds weights that the last-level cache has long evicted. Warm: each call repeats the last one."""


@dataclass(frozen=True)
class Case:
    """One problem of one op. Fields that an op has no use for keep their default."""

    op: str
    M: int = 0
    N: int = 0
    K: int = 0
    r: int = 0
    dropout: float = 0.0
    blocksize: int = 64
    dtype: torch.dtype = torch.bfloat16
    tensors: int = 0
    device: str = "cpu"
    isa: str | None = None
    """Instruction set to force (QLORA_CPU_ISA), in a process of its own; None: the best one there is."""
    label: str = ""
    """What it is called where N and K do not say it."""
    quick: bool = False
    """Part of the short run that only shows that everything works."""

    @property
    def weight(self) -> tuple[int, int, int, torch.dtype, str]:
        """What names its weight: (N, K, blocksize, dtype, device)."""
        return self.N, self.K, self.blocksize, self.dtype, self.device

    @property
    def arithmetic(self) -> str:
        """The peak (bench/peaks.py) that bounds its flops."""
        return "fma" if self.dtype == torch.float32 else "bf16"

    @property
    def name(self) -> str:
        """What people call it, e.g. `4096x4096 M1 bf16`; with `op` unique among all cases of one device."""
        words = [self.label or f"{self.N}x{self.K}"]
        words += [f"{self.tensors} tensors"] if self.tensors else []
        words += [f"M{self.M}"] if self.M else []
        words += [f"r{self.r}"] if self.r else []
        words += [f"p{self.dropout:g}"] if self.dropout else []
        words += [DTYPE_NAMES[self.dtype]]
        words += [self.isa] if self.isa else []
        return " ".join(words)


@dataclass(frozen=True)
class Cost:
    """What a case must move and compute, however it is done: weights once, activations once, results once."""

    bytes: int
    flops: int
    bandwidth: str = "read"
    """The peak (bench/peaks.py) that bounds the bytes: "read", or "copy" where much of them is written."""


Call = Callable[[], Any]
"""Runs a case once and returns its result."""


@dataclass(frozen=True)
class Contender:
    """One implementation of an op.

    build: (case, inputs, copies) -> `copies` calls, the i-th on the i-th copy of the weights. Priming that a user would
        not see on each call (a layer's repacking at its first use) belongs here.
    weight_bytes: of one copy, as this contender stores it: decides how many copies overflow the cache.
    applies: to which cases; peers that are slow or wrong somewhere say so here.
    threads: torch's thread count while it runs; None: the run's.
    cost: where what it must move differs from what the suite says.
    measures: (case, call after its first run) -> fields that its rows get beside times, e.g. bytes of state.
    """

    name: str
    build: Callable[[Case, Any, int], Sequence[Call]]
    weight_bytes: Callable[[Case], int]
    applies: Callable[[Case], bool] = lambda case: True
    threads: int | None = None
    cost: Callable[[Case], Cost] | None = None
    measures: Callable[[Case, Call], dict[str, Any]] = lambda case, call: {}


@dataclass(frozen=True)
class Suite:
    """An op's benchmark.

    inputs: what all contenders of a case share, drawn from fixed seeds.
    verify: (case, inputs, contender's name, result); raises AssertionError where the result is wrong. Runs before any
        number is taken, and no number is taken where it raises.
    """

    op: str
    cases: Callable[[str], Iterable[Case]]
    cost: Callable[[Case], Cost]
    inputs: Callable[[Case], Any]
    contenders: tuple[Contender, ...]
    verify: Callable[[Case, Any, str, Any], None]
    modes: tuple[str, ...] = (COLD, WARM)
