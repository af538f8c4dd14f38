"""Measures every plan for a GPU's matmul shapes and writes the fastest ones: `qlora-kernels bench tune`.

    python -m bench.tune [--shapes 4096x4096 14336x4096 ...] [--rows 1 8 16 32 64 128 256 512 1024] [--out FOLDER]

For each op, shape NxK and number of rows it times the candidates of backends/triton/planner.py and the paths of
backends/cuda/routing.py, by CUDA graphs and cold in L2, after checking each one's result against a dense
product, and keeps the fastest. The file, ops/tuned/sm_<capability>.json, overrides the
analytical models from the next process on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.backends.cuda import routing
from qlora_kernels.backends.triton import planner
from qlora_kernels.backends.triton.planner import candidates, use_plan
from qlora_kernels.ops import measured_plans
from qlora_kernels.ops.operands import weight_of
from qlora_kernels.ops.registry import Problem, unavailable

from . import graphs
from .machine import provenance

SHAPES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336", "5120x5120", "8192x8192")
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SAMPLES = 15
TOLERANCE = 2.0**-6
"""Largest relative difference to the decode path's result, from bf16 sums in another order."""


def choices(problem: Problem, backends: Sequence[str]) -> Iterator[tuple[dict[str, Any], AbstractContextManager[None]]]:
    """Return (entry of the tuned file, context that forces it) of each path of a backend."""
    if "triton" in backends:
        for candidate in candidates(problem):
            yield {"backend": "triton"} | asdict(candidate), use_plan(problem.op, candidate)
    if "cuda" in backends:
        for path in routing.served_paths(problem, planner.capability_of(torch.device("cuda"))):
            yield {"backend": "cuda", "path": path}, routing.use_path(path)


def best_plan(problem: Problem, flush: Tensor, backends: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Return the entry of the fastest path with a correct result, and its seconds.

    Raises RuntimeError if no path gives a correct result.
    """
    weight = torch.randn(problem.N, problem.K, device="cuda", dtype=problem.dtype) / problem.K**0.5
    packed, state = qk.quantize_nf4(weight)
    backward = problem.op == "linear_nf4_grad_x"
    rows = torch.randn(problem.M, problem.N if backward else problem.K, device="cuda", dtype=problem.dtype)
    weights = [packed, *(packed.clone() for _ in range(graphs.copies_beyond_l2(packed.numel()) - 1))]

    def call(packed: Tensor) -> Tensor:
        if backward:
            grad_x: Tensor = torch.ops.qlora_kernels.linear_nf4_grad_x(rows, *weight_of(problem.op, packed, state))
            return grad_x
        return qk.linear_nf4(rows, packed, state)

    dense = qk.dequantize_nf4(packed, state, problem.dtype)
    expected = (rows @ dense if backward else rows @ dense.T).float()
    measured = []
    for entry, chosen in choices(problem, backends):
        with chosen, qk.use_backend(entry["backend"]):
            difference = (call(packed).float() - expected).abs().max() / expected.abs().max()
            if not difference <= TOLERANCE:
                sys.stderr.write(f"tune: {entry} is wrong by {difference:.2e} on {problem}: left out\n")
                continue
            calls = [partial(call, packed) for packed in weights]
            measured.append((graphs.median_seconds(calls, SAMPLES, flush), entry))
    if not measured:
        raise RuntimeError(f"tune: no way gives the right result for {problem}")
    seconds, best = min(measured, key=lambda pair: pair[0])
    return best, seconds


def main() -> int:
    """Tune the plans of the GPU in this machine."""
    parser = argparse.ArgumentParser(prog="qlora-kernels bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--out", type=Path, default=measured_plans.FOLDER)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: no CUDA device is visible to torch; nothing was tuned", file=sys.stderr)
        return 2
    capability = planner.capability_of(torch.device("cuda"))
    backends = [name for name in measured_plans.BACKENDS if unavailable(name) is None]
    flush, plans = graphs.flush_buffer(), dict(measured_plans.entries(capability))
    for shape in options.shapes:
        N, K = (int(size) for size in shape.split("x"))
        for op in ("linear_nf4", "linear_nf4_grad_x"):
            for M in options.rows:
                key = measured_plans.bucket(problem := Problem(op, "cuda", torch.bfloat16, M, N, K, 0, 64, True))
                plans[key], seconds = best_plan(problem, flush, backends)
                print(f"{key}: {plans[key]} {seconds * 1e6:.1f} us", flush=True)
    measured_on = {name: str(value) for name, value in provenance("cuda").items()}
    print(measured_plans.write(capability, plans, measured_on, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
