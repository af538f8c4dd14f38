"""Run the benchmarks: `python -m bench.run [cpu|cuda] [--suite NAME ...] [--only REGEX] [--quick] [--out FILE]`.

For each case, every implementation is built and its result verified; the correct ones are timed, interleaved, with cold
and with warm weights. Each implementation, case and mode gives one row (a flat dict; bench/report.py lists its fields).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .limits import LIMITS, limit, obeys
from .machine import ROOT, cache_bytes, provenance
from .optional import complete, left_out, runs
from .peaks import Peak, measure_peaks
from .registry import COLD, GATE_SEED, Call, Case, Contender, Cost, Suite
from .report import print_report
from .row_file import Row, RowWriter
from .suites import GROUPS, suites
from .timing import Budget, TimedCalls, Timing, measure

WORKING_SET = 4
"""Cold weights exceed the last-level cache by this factor before one is used again."""

MAX_COPIES = 1024

QUICK = Budget(rounds=1, samples=1, seconds=0.5, least=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return 1 if a result was wrong or an implementation failed, otherwise 0."""
    options = parser().parse_args(arguments)
    if options.limit and limit() != options.limit:
        # The libraries read these variables when a process starts.
        command = [sys.executable, "-m", "bench.run", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env={**os.environ, **LIMITS[options.limit]}, check=False).returncode
    budget = QUICK if options.quick else Budget(seconds=options.seconds)
    rows = []
    with contextlib.ExitStack() as files:
        # Line buffering keeps every measured row if the run is interrupted.
        out = RowWriter(files.enter_context(options.out.open("a", buffering=1))) if options.out else None
        ops = [op for name in options.suite or GROUPS for op in GROUPS[name]]
        for row in run(options.device, options.only, ops=ops, quick=options.quick, isa=options.isa, budget=budget):
            rows.append(row)
            if out:
                out.write(row)
            if options.json:
                print(json.dumps(row), flush=True)
    if not options.json:
        print_report(rows, targets=not options.quick)
    return int(any(row["gate"] != "green" for row in rows))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    made.add_argument("device", nargs="?", choices=("cpu", "cuda"), default="cpu")
    made.add_argument(
        "--suite", nargs="+", choices=GROUPS, metavar="NAME", help=f"only these: {', '.join(GROUPS)}; default: all"
    )
    made.add_argument("--only", default="", metavar="REGEX", help='cases whose "op name" it matches')
    made.add_argument("--quick", action="store_true", help="a few small cases, to see that everything works")
    made.add_argument("--json", action="store_true", help="rows as JSON lines on standard output, no table")
    made.add_argument("--out", type=Path, metavar="FILE", help="append the rows to this file, too")
    made.add_argument(
        "--seconds", type=float, default=Budget.seconds, help="time for one case and mode, at least three rounds"
    )
    made.add_argument(
        "--limit", choices=LIMITS, help="compute as a machine with this instruction set does (bench/limits.py)"
    )
    made.add_argument("--isa", help=argparse.SUPPRESS)  # for the child process of a forced instruction set
    return made


def run(device: str, only: str, *, ops: Sequence[str], quick: bool, isa: str | None, budget: Budget) -> Iterator[Row]:
    """Yield the rows of all selected cases; those of forced instruction sets are run by child processes.

    device: "cpu" or "cuda".   only: a regular expression for "op case".   ops: suites.   quick: only the quick cases.
    isa: the instruction set that this process is limited to.   budget: time for a case.
    """
    chosen = [
        (suite, case)
        for suite in suites().values()
        if suite.op in ops
        for case in suite.cases(device)
        if (case.quick or not quick) and re.search(only, f"{case.op} {case.name}")
    ]
    if limit() is not None:
        chosen = [(suite, case) for suite, case in chosen if case.isa is None]
    here = [(suite, case) for suite, case in chosen if case.isa == isa]
    common = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **provenance(device)}
    if isa is None:
        for line in left_out(suite for suite, _ in chosen):
            print(line, file=sys.stderr, flush=True)
    here = [(suite, case) for suite, case in here if complete(suite)]
    peaks = measure_peaks(device, isa or limit()) if here else {}
    for peak in peaks.values():
        yield peak_row(peak, isa) | common
    for suite, case in here:
        print(f"{case.op} {case.name}", file=sys.stderr, flush=True)
        for row in run_case(suite, case, peaks, budget):
            yield row | common
    if isa is None:
        for forced in dict.fromkeys(case.isa for _, case in chosen if case.isa):
            yield from run_child(device, only, forced, budget)


def run_child(device: str, only: str, isa: str, budget: Budget) -> Iterator[Row]:
    """Yield the rows of one forced instruction set, from a process that starts with it."""
    command = [sys.executable, "-m", "bench.run", device, "--json", "--isa", isa, "--only", only]
    done = subprocess.run(
        [*command, "--seconds", str(budget.seconds)],
        cwd=ROOT,
        env={**os.environ, "QLORA_CPU_ISA": isa},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if not rows:
        print(f"no rows for {isa}: exit status {done.returncode}", file=sys.stderr)
    yield from rows


def run_case(suite: Suite, case: Case, peaks: dict[str, Peak], budget: Budget) -> Iterator[Row]:
    """Verify all implementations of a case, then time them in each mode."""
    inputs = suite.inputs(case)
    threads = torch.get_num_threads()
    right: dict[str, tuple[Contender, Sequence[Call]]] = {}
    measures: dict[str, Row] = {}
    for contender in suite.contenders:
        if not (runs(contender, case) and obeys(contender)):
            continue
        try:
            calls = build(contender, case, inputs, copies_beyond_cache(contender, case))
            fault = fault_of(suite, case, inputs, contender, calls[0])
            measured = {} if fault else contender.measures(case, calls[0])
        except Exception as error:  # of one contender, such as a peer that fails on this machine; the others still run
            fault = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if fault is None:
            right[contender.name], measures[contender.name] = (contender, calls), measured
        else:
            yield case_row(case, contender, threads, None) | {"gate": f"red: {fault}"}
    for mode in suite.modes:
        implementations = {
            name: TimedCalls(calls if mode == COLD else calls[:1], contender.threads or threads)
            for name, (contender, calls) in right.items()
        }
        timings = measure(implementations, case.device, budget) if implementations else {}
        for name, timing in timings.items():
            contender = right[name][0]
            row = case_row(case, contender, threads, mode) | timing_fields(timing) | measures[name]
            row |= rates(case, (contender.cost or suite.cost)(case), timing, peaks) | ratios(name, timings)
            yield row | memory_ratios(name, measures)


def copies_beyond_cache(contender: Contender, case: Case) -> int:
    """Return how many copies of the weights overflow the last-level cache WORKING_SET times; 1 without weights."""
    weight_bytes = contender.weight_bytes(case)
    if weight_bytes == 0:
        return 1
    return min(MAX_COPIES, math.ceil(WORKING_SET * cache_bytes(case.device) / weight_bytes) + 1)


def build(contender: Contender, case: Case, inputs: Any, copies: int) -> Sequence[Call]:
    """Return the implementation's calls, without the warnings that peers print when they are built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return contender.build(case, inputs, copies)


def fault_of(suite: Suite, case: Case, inputs: Any, contender: Contender, call: Call) -> str | None:
    """Return the error in the call's result, or None."""
    torch.manual_seed(GATE_SEED)
    result = call()
    try:
        with torch.no_grad():
            suite.verify(case, inputs, contender.name, result)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


def case_row(case: Case, contender: Contender, threads: int, mode: str | None) -> Row:
    """Return the fields of a row that identify the measurement."""
    return {
        "op": case.op,
        "case": case.name,
        "M": case.M,
        "N": case.N,
        "K": case.K,
        "r": case.r,
        "dropout": case.dropout,
        "blocksize": case.blocksize,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tensors": case.tensors,
        "forced_isa": case.isa,
        "contender": contender.name,
        "threads": contender.threads or threads,
        "mode": mode,
        "gate": "green",
    }


def timing_fields(timing: Timing) -> Row:
    """Return the times of a call in microseconds and their spread."""
    return {
        "median_us": round(timing.median * 1e6, 2),
        "p10_us": round(timing.p10 * 1e6, 2),
        "p90_us": round(timing.p90 * 1e6, 2),
        "samples": timing.samples,
        "foreign": round(timing.foreign, 3),
    }


def rates(case: Case, cost: Cost, timing: Timing, peaks: dict[str, Peak]) -> Row:
    """Return rates, their fractions of the measured peaks, and the fraction of the roofline of both."""
    moved, computed = cost.bytes / timing.median, cost.flops / timing.median
    of_bandwidth = moved / peaks[cost.bandwidth].rate
    of_arithmetic = computed / peaks[case.arithmetic].rate
    return {
        "gbps": round(moved / 1e9, 2),
        "gflops": round(computed / 1e9, 1),
        "fraction": {cost.bandwidth: round(of_bandwidth, 3), case.arithmetic: round(of_arithmetic, 3)},
        "roofline": round(max(of_bandwidth, of_arithmetic), 3),
    }


def ratios(name: str, timings: dict[str, Timing]) -> Row:
    """Return the speedups of this implementation over each other one."""
    others = {other: timing for other, timing in timings.items() if other != name}
    return {"speedup": {other: round(timing.median / timings[name].median, 3) for other, timing in others.items()}}


def memory_ratios(name: str, measures: dict[str, Row]) -> Row:
    """Return this implementation's peak memory over each other's; empty if it was not measured."""
    peaks = {other: fields["peak_bytes"] for other, fields in measures.items() if "peak_bytes" in fields}
    if name not in peaks:
        return {}
    return {"memory_ratio": {other: round(peaks[name] / peak, 3) for other, peak in peaks.items() if other != name}}


def peak_row(peak: Peak, isa: str | None) -> Row:
    """Return the row of one measured peak."""
    return {
        "op": "peak",
        "case": peak.name,
        "forced_isa": isa,
        "contender": peak.how,
        "mode": None,
        "gate": "green",
        "rate": round(peak.rate / 1e9, 1),
    }


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
