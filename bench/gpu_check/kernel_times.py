"""Times step: the kernels of one backend by CUDA-graph replay, cold in L2; each path forced, beside a dense product.

Writes DIR/sm_<capability>.json, in the form of qlora_kernels/ops/tuned, from the fastest rows of all backends so far
whose path gave no wrong result. With --path NAME, that path alone is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import qlora_kernels as qk
from qlora_kernels.backends.cuda import routing
from qlora_kernels.backends.triton import planner
from qlora_kernels.ops import measured_plans
from qlora_kernels.ops.registry import Problem

from .. import graphs
from . import rows as rows_module
from .cases import TINY_SIZES
from .forced_paths import forced_paths, is_proved
from .rows import Rows, read, step_arguments
from .timed_sizes import ROWS, SHAPES

BEST_PLANS = 4
"""Number of timed Triton plans, the first ones in the model's ranking."""

MOST_COPIES = 32
"""Maximum number of copies of a weight that are read in turn."""

SAMPLES = 15
"""Number of replays of each graph; the median of their times is used."""


Forced = tuple[dict[str, Any], AbstractContextManager[None]]
"""Entry of the tuned file, and the context that forces it."""


def paths(problem: Problem, backend: str, capability: int, best: int = BEST_PLANS, only: str = "") -> Iterator[Forced]:
    """Yield each way of one backend that is timed; of Triton's plans, the `best` that the model ranks first.

    only: the path of the cuda backend that is timed, as in `forced_paths`.
    """
    if backend == "cuda":
        for path in forced_paths(problem, capability, only):
            yield {"backend": "cuda", "path": path}, routing.use_path(path)
        return
    arch = planner.arch_for(capability)
    ranked = sorted(planner.candidates(problem), key=lambda plan: planner.modelled_seconds(problem, plan, arch))
    for plan in ranked[:best]:
        yield {"backend": "triton"} | asdict(plan), planner.use_plan(problem.op, plan)


def shapes(tiny: bool) -> tuple[tuple[int, int], ...]:
    """Return the weights [N, K] that are timed, or that of a rehearsal."""
    return ((TINY_SIZES.N, TINY_SIZES.K),) if tiny else SHAPES


def row_counts(tiny: bool) -> tuple[int, ...]:
    """Return the numbers of rows of x that are timed."""
    return (TINY_SIZES.M,) if tiny else ROWS


def best_plans(tiny: bool) -> int:
    """Return the number of Triton plans that are timed."""
    return 1 if tiny else BEST_PLANS


def measure_shape(
    rows: Rows,
    backend: str,
    shape: tuple[int, int],
    counts: tuple[int, ...],
    flush: torch.Tensor,
    samples: int = SAMPLES,
    best: int = BEST_PLANS,
    copies: int = MOST_COPIES,
    only: str = "",
) -> None:
    """Time all paths, or `only` one, for one weight [N, K].

    counts: numbers of rows.   copies: of the weight, so that L2 holds none.
    """
    N, K = shape
    capability = planner.capability_of(torch.device("cuda", torch.cuda.current_device()))
    w = torch.randn(N, K, device=rows_module.DEVICE, dtype=torch.bfloat16) / K**0.5
    with qk.use_backend(backend):
        packed, state = qk.quantize_nf4(w)
    weights = [packed, *(packed.clone() for _ in range(graphs.copies_beyond_l2(packed.numel(), copies) - 1))]
    dense = [w, *(w.clone() for _ in range(graphs.copies_beyond_l2(2 * w.numel(), copies) - 1))]
    for M in counts:
        x = torch.randn(M, K, device=rows_module.DEVICE, dtype=torch.bfloat16)
        problem = Problem("linear_nf4", "cuda", torch.bfloat16, M, N, K, 0, 64, True)
        seconds = graphs.median_seconds([partial(torch.mm, x, one.T) for one in dense], samples, flush)
        rows.add(backend="torch", path="dense", M=M, N=N, K=K, us=seconds * 1e6)
        for entry, forced in paths(problem, backend, capability, best, only):
            with forced, qk.use_backend(backend):
                calls = [partial(qk.linear_nf4, x, one, state) for one in weights]
                seconds = graphs.median_seconds(calls, samples, flush)
            rows.add(M=M, N=N, K=K, us=seconds * 1e6, key=measured_plans.bucket(problem), entry=entry, **_names(entry))


def _names(entry: dict[str, Any]) -> dict[str, str]:
    return {"backend": entry["backend"], "path": entry["path"]}


def main() -> int:
    """Run the step for the kernels of one backend, and return the exit code."""
    arguments = step_arguments(__doc__)
    rows = Rows(arguments.out, "times")
    tiny = arguments.tiny
    flush = graphs.flush_buffer(1 << 12) if tiny else graphs.flush_buffer()
    samples, copies = (1, 1) if tiny else (SAMPLES, MOST_COPIES)
    for shape in shapes(tiny):
        measure_shape(
            rows, arguments.backend, shape, row_counts(tiny), flush, samples, best_plans(tiny), copies, arguments.path
        )
    write_tuned(arguments.out, rows)
    return 0


def write_tuned(folder: Any, rows: Rows) -> None:
    """Write the fastest entries of all rows so far whose path is proved."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    found = read(folder)
    for row in found:
        if "entry" not in row or (row["backend"] == "cuda" and not is_proved(row["path"], found)):
            continue
        if row["us"] < best.get(row["key"], (float("inf"), {}))[0]:
            best[row["key"]] = (row["us"], row["entry"])
    capability = planner.capability_of(torch.device("cuda", torch.cuda.current_device()))
    measured_on = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    path = measured_plans.write(capability, {key: entry for key, (_, entry) in best.items()}, measured_on, folder)
    rows.add(tuned=str(path), entries=len(best))


if __name__ == "__main__":
    sys.exit(main())
