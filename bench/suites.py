"""All benchmarks: one suite for each op, the training step, evaluation and generation."""

from __future__ import annotations

import importlib
import pkgutil

from . import end_to_end, evaluation, generation, ops
from .registry import Suite


def suites() -> dict[str, Suite]:
    """Return every suite by the name of its op."""
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.name.startswith("bench_"))
    found = [importlib.import_module(f"{ops.__name__}.{name}").SUITE for name in names]
    return {suite.op: suite for suite in (*found, end_to_end.SUITE, evaluation.SUITE, generation.SUITE)}
