"""The paths of the cuda backend that a step forces, and whether a path gave right results."""

from __future__ import annotations

from qlora_kernels.backends.cuda import routing
from qlora_kernels.ops.registry import Problem

from .rows import Row


def forced_paths(problem: Problem, capability: int, only: str) -> list[str]:
    """Return the paths that serve a base product, and of these `only`; "" for all but those of routing.ON_REQUEST."""
    served = routing.served_paths(problem, capability)
    return [path for path in served if path == only or (not only and path not in routing.ON_REQUEST)]


def is_proved(path: str, rows: list[Row]) -> bool:
    """Whether all comparisons of a path gave the right result; for a path of routing.ON_REQUEST there must be some."""
    results = [row["ok"] for row in rows if row["step"] == "compare" and row.get("path") == path]
    return all(results) and (bool(results) or path not in routing.ON_REQUEST)
