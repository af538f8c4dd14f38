"""Measures every plan for a GPU's matmul shapes and writes the fastest ones: `qlora-kernels bench tune`.

    python -m bench.tune [--shapes 4096x4096 14336x4096 ...] [--rows 1 8 16 32 64 128 256 512 1024] [--out FOLDER]

For each op, shape NxK and number of rows, the candidates of backends/triton/planner.py are timed, cold in L2, after
their results were compared with the decode path, and the fastest is kept. The file, tuned/sm_<capability>.json,
overrides the analytical model in later processes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.backends.triton import planner
from qlora_kernels.backends.triton.planner import Plan, bucket, candidates, use_plan, write_tuned
from qlora_kernels.ops.operands import weight_of
from qlora_kernels.ops.registry import Problem

from .machine import provenance

SHAPES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336", "5120x5120", "8192x8192")
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
WARM_UPS, SAMPLES = 5, 30
TOLERANCE = 2.0**-6
"""Largest relative difference to the decode path's result, from bf16 sums in another order."""


def median_seconds(call: Callable[[], object], flush: Tensor) -> float:
    """Return the median of SAMPLES calls, each after the L2 cache was overwritten."""
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(SAMPLES):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    median: float = statistics.median(times)
    return median


def best_plan(problem: Problem, flush: Tensor) -> tuple[Plan, float]:
    """Return the fastest correct plan and its seconds."""
    weight = torch.randn(problem.N, problem.K, device="cuda", dtype=problem.dtype) / problem.K**0.5
    packed, state = qk.quantize_nf4(weight)
    backward = problem.op == "linear_nf4_grad_x"
    rows = torch.randn(problem.M, problem.N if backward else problem.K, device="cuda", dtype=problem.dtype)

    def call() -> Tensor:
        if backward:
            grad_x: Tensor = torch.ops.qlora_kernels.linear_nf4_grad_x(rows, *weight_of(problem.op, packed, state))
            return grad_x
        return qk.linear_nf4(rows, packed, state)

    with use_plan(problem.op, Plan("decode")):
        expected = call().float()
    measured = []
    for candidate in candidates(problem):
        with use_plan(problem.op, candidate):
            difference = (call().float() - expected).abs().max() / expected.abs().max()
            if difference > TOLERANCE:
                print(f"tune: {candidate} is wrong by {difference:.2e} on {problem}: left out", file=sys.stderr)
                continue
            measured.append((median_seconds(call, flush), candidate))
    seconds, best = min(measured, key=lambda pair: pair[0])
    return best, seconds


def main() -> int:
    """Tune the plans of the GPU in this machine."""
    parser = argparse.ArgumentParser(prog="qlora-kernels bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--out", type=Path, default=planner.TUNED)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: no CUDA device is visible to torch; nothing was tuned", file=sys.stderr)
        return 2
    capability = planner.capability_of(torch.device("cuda"))
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    plans = dict(planner.tuned_plans(capability))
    with qk.use_backend("triton"):
        for shape in options.shapes:
            N, K = (int(size) for size in shape.split("x"))
            for op in ("linear_nf4", "linear_nf4_grad_x"):
                for M in options.rows:
                    problem = Problem(op, "cuda", torch.bfloat16, M, N, K, 0, 64, True)
                    plans[bucket(problem)], seconds = best_plan(problem, flush)
                    print(f"{bucket(problem)}: {plans[bucket(problem)]} {seconds * 1e6:.1f} us", flush=True)
    measured_on = {name: str(value) for name, value in provenance("cuda").items()}
    print(write_tuned(capability, plans, measured_on, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
