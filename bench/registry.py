"""The definition of benchmarks: an op's problems, their minimum cost, its implementations and the check of results.

bench/ops/bench_<op>.py defines a module constant SUITE, which bench/suites.py finds. This module is independent of the
device: a Case names its device, and a Contender the cases to which it applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

GATE_SEED = 0
"""torch's seed for the call whose result is verified, so that its dropout mask can be drawn again."""

COLD, WARM = "cold", "warm"
"""Cold: each call uses weights that are no longer in the last-level cache. Warm: each call repeats the last one."""


@dataclass(frozen=True)
class Case:
    """One problem of one op. Fields that do not apply to an op keep their default."""

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
    """Instruction set to force (QLORA_CPU_ISA), in a separate process; None: the automatic choice."""
    label: str = ""
    """Name of the case if N and K do not describe it."""
    quick: bool = False
    """Whether the case is part of the short run, which only checks that everything works."""

    @property
    def weight(self) -> tuple[int, int, int, torch.dtype, str]:
        """The identity of its weight: (N, K, blocksize, dtype, device)."""
        return self.N, self.K, self.blocksize, self.dtype, self.device

    @property
    def arithmetic(self) -> str:
        """The peak (bench/peaks.py) that limits its flops."""
        return "fma" if self.dtype == torch.float32 else "bf16"

    @property
    def name(self) -> str:
        """A readable name, e.g. `4096x4096 M1 bf16`; together with `op` it is unique among all cases of one device."""
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
    """The minimum that a case must move and compute in any implementation: weights, activations and results once."""

    bytes: int
    flops: int
    bandwidth: str = "read"
    """The peak (bench/peaks.py) that limits the bytes: "read", or "copy" if many of them are written."""


Call = Callable[[], Any]
"""Runs a case once and returns its result."""


@dataclass(frozen=True)
class Contender:
    """One implementation of an op.

    build: (case, inputs, copies) -> `copies` calls, the i-th on the i-th copy of the weights. It includes preparation
    that does not occur on each call, such as a layer's repacking at its first use.
    weight_bytes: of one copy, as this implementation stores it; determines the number of copies that exceed the cache.
    applies: whether a case is supported; it excludes peers where they are slow or wrong.
    packages: those of bench/optional.py without which the implementation is left out, with a printed reason.
    threads: torch's thread count during the call; None: the run's.
    cost: replaces the suite's cost for implementations that must move other bytes.
    measures: (case, call after its first run) -> further fields of its rows, e.g. bytes of state.
    """

    name: str
    build: Callable[[Case, Any, int], Sequence[Call]]
    weight_bytes: Callable[[Case], int]
    applies: Callable[[Case], bool] = lambda case: True
    packages: tuple[str, ...] = ()
    threads: int | None = None
    cost: Callable[[Case], Cost] | None = None
    measures: Callable[[Case, Call], dict[str, Any]] = lambda case, call: {}


@dataclass(frozen=True)
class Suite:
    """An op's benchmark.

    inputs: tensors that all implementations of a case share, drawn from fixed seeds.
    verify: (case, inputs, implementation's name, result); raises AssertionError for a wrong result. It runs before the
    timing, and a wrong result is not timed.
    packages: those of bench/optional.py without which the whole suite is left out, because its inputs need them.
    """

    op: str
    cases: Callable[[str], Iterable[Case]]
    cost: Callable[[Case], Cost]
    inputs: Callable[[Case], Any]
    contenders: tuple[Contender, ...]
    verify: Callable[[Case, Any, str, Any], None]
    modes: tuple[str, ...] = (COLD, WARM)
    packages: tuple[str, ...] = ()
