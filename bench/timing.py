"""Interleaved timing on a machine that may have other load.

Implementations take turns, round after round, so that a slow minute affects all of them. Each round also measures the
processor time of other processes. Disturbed rounds are repeated within a time budget, and the statistics are computed
over the undisturbed ones. The selection does not depend on the times themselves.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from . import graphs
from .registry import Call

QUIET = 0.06
"""Largest share of the processors that others may use in an undisturbed round. The kernel counts ticks of 10 ms."""

TURN_S = 0.04
"""Duration of one turn in seconds, unless one call takes longer."""

SETTLE_S = 0.002
"""Untimed calls at the start of a turn, because threads of the previous runtime may still be spinning."""


@dataclass(frozen=True)
class Budget:
    """When to stop: after enough undisturbed rounds and samples, or when the time is over and `least` rounds are
    done.
    """

    rounds: int = 5
    samples: int = 15
    seconds: float = 4.0
    least: int = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call. `foreign`: fraction of the processors that other processes used during the measurement."""

    median: float
    p10: float
    p90: float
    samples: int
    foreign: float


@dataclass(frozen=True)
class TimedCalls:
    """One implementation's calls, in rotation: warm if there is one call, cold if there are many."""

    calls: Sequence[Call]
    threads: int


@dataclass
class _Round:
    foreign: float
    times: dict[str, list[float]] = field(default_factory=dict)


def measure(implementations: Mapping[str, TimedCalls], device: str, budget: Budget) -> dict[str, Timing]:
    """Time the calls of all implementations, interleaved in random order."""
    clock = clock_of(device)
    if device == "cuda":
        implementations = {
            name: TimedCalls([_replayed(implementation.calls)], implementation.threads)
            for name, implementation in implementations.items()
        }
    started, before = time.perf_counter(), torch.get_num_threads()
    circles = {name: itertools.cycle(implementation.calls) for name, implementation in implementations.items()}
    rounds: list[_Round] = []
    gc.collect()
    gc.disable()
    try:
        lengths = {
            name: _turn_length(clock, circles[name], implementation.threads)
            for name, implementation in implementations.items()
        }
        while True:
            rounds.append(_run_round(clock, implementations, circles, lengths))
            quiet = [r for r in rounds if r.foreign <= QUIET]
            samples = sum(min(lengths.values()) for _ in quiet)
            slow = min(lengths.values()) == 1
            enough = len(quiet) >= budget.rounds and (samples >= budget.samples or slow)
            late = len(rounds) >= budget.least and time.perf_counter() - started > budget.seconds
            if enough or late:
                break
    finally:
        gc.enable()
        torch.set_num_threads(before)
    chosen = quiet if len(quiet) >= 3 else sorted(rounds, key=lambda r: r.foreign)[:3]
    foreign = statistics.mean(r.foreign for r in chosen)
    return {name: summarize([t for r in chosen for t in r.times[name]], foreign) for name in implementations}


def summarize(times: Sequence[float], foreign: float) -> Timing:
    """Return the median, the deciles and the count of times."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1, foreign)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[0], deciles[8], len(times), foreign)


def clock_of(device: str) -> Callable[[Call], float]:
    """Return a function that runs a call and returns its seconds on `device`."""
    return graphs.seconds if device == "cuda" else _host_seconds


def _replayed(calls: Sequence[Call]) -> Call:
    """Return the calls as one replayed CUDA graph, or as a sequence if they cannot be captured."""
    try:
        return graphs.Graphed(calls)
    except RuntimeError as reason:
        warnings.warn(f"timed with the host's part: no CUDA graph of a contender ({reason})", stacklevel=2)
        return _InTurn(calls)


class _InTurn:
    """A sequence of calls from Python. `count`: the number of calls."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.count = calls, len(calls)

    def __call__(self) -> None:
        for call in self.calls:
            call()


def _host_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-9)  # a coarse clock may not have moved


def _turn_length(clock: Callable[[Call], float], calls: itertools.cycle[Call], threads: int) -> int:
    torch.set_num_threads(threads)
    fastest = clock(next(calls))
    if fastest < 10 * TURN_S:
        fastest = min(clock(next(calls)) for _ in range(2))
    return max(1, min(1000, round(TURN_S / fastest)))


def _run_round(
    clock: Callable[[Call], float],
    implementations: Mapping[str, TimedCalls],
    circles: Mapping[str, itertools.cycle[Call]],
    lengths: Mapping[str, int],
) -> _Round:
    times = {}
    wall, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    for name, implementation in implementations.items():
        torch.set_num_threads(implementation.threads)
        settle_until = time.perf_counter() + SETTLE_S
        while lengths[name] > 1 and time.perf_counter() < settle_until:
            next(circles[name])()
        times[name] = [clock(next(circles[name])) for _ in range(lengths[name])]
    wall, busy, own = time.perf_counter() - wall, _busy_seconds() - busy, time.process_time() - own
    return _Round(max(0.0, busy - own) / (max(wall, 1e-9) * (os.cpu_count() or 1)), times)


def _busy_seconds() -> float:
    """Return the processor time of all processes since the machine started; 0 if it is not available."""
    try:
        with open("/proc/stat", encoding="utf-8") as stat:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
