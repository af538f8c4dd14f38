"""Measured choices of the GPU backends: tuned/sm_<capability>.json, which `qlora-kernels bench tune` writes.

    {"measured_on": {...}, "plans": {"<bucket>": {"backend": "triton" | "cuda", "path": ..., tile sizes}}}

An entry names the backend and the path that were fastest for a problem, and for Triton the tile. It decides between the
backends (`priority`) and, inside the backend that it names, between its paths. A plan without "backend" is Triton's.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .registry import Problem

FOLDER = Path(__file__).parent / "tuned"
BACKENDS = ("triton", "cuda")


def bucket(problem: Problem) -> str:
    """Return the key of a problem: M is rounded up to a power of two, all other values are exact."""
    rows = 1 << max(0, problem.M - 1).bit_length()
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{problem.op}:{dtype}:M{rows}:N{problem.N}:K{problem.K}:b{problem.blocksize}"


@cache
def entries(capability: int, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return bucket -> fields of the fastest plan on GPUs of this compute capability; empty if there are no
    measurements.

    Raises ValueError for an entry that names an unknown backend.
    """
    path = (FOLDER if folder is None else folder) / f"sm_{capability}.json"
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for key, fields in json.loads(path.read_text(encoding="utf-8"))["plans"].items():
        found[key] = {"backend": "triton"} | fields
        if found[key]["backend"] not in BACKENDS:
            raise ValueError(
                f"{path.name}: backend must be one of {BACKENDS}, got {found[key]['backend']!r} for {key}; "
                "measure again with `qlora-kernels bench tune`"
            )
    return found


def entry_for(problem: Problem, capability: int) -> dict[str, Any] | None:
    """Return the measured plan of the base product of `problem`, which is the same with and without an adapter."""
    backward = problem.op.endswith(("_backward", "_grad_x"))
    base = problem._replace(op="linear_nf4_grad_x" if backward else "linear_nf4")
    return entries(capability).get(bucket(base))


def priority(problem: Problem, backend: str) -> int:
    """Return 1 if the current GPU's measurements name `backend` for the product, else 0."""
    if problem.device != "cuda" or not problem.op.startswith("linear_nf4") or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    entry = entry_for(problem, 10 * major + minor)
    return int(entry is not None and entry["backend"] == backend)


def write(
    capability: int, plans: dict[str, dict[str, Any]], measured_on: dict[str, str], folder: Path = FOLDER
) -> Path:
    """Write measured plans by rename; `measured_on` names the GPU and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm_{capability}.json"
    content = {"measured_on": measured_on, "plans": dict(sorted(plans.items()))}
    draft = path.with_suffix(".json.partial")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    return path
