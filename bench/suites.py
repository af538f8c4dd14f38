"""All benchmarks: suites of ops, of the training step, evaluation, generation and PEFT methods, and their groups."""

from __future__ import annotations

import importlib
import pkgutil

from . import end_to_end, evaluation, generation, methods, ops
from .registry import Suite

GROUPS = {
    "codec": ("quantize_nf4", "dequantize_nf4"),
    "linear": ("linear_nf4", "linear_nf4_grad_x", "linear_nf4_lora"),
    "adamw": ("adamw_step",),
    "parts": ("attention", "linear_cross_entropy", "model_parts"),
    "step": ("train_step", "evaluate"),
    "generate": ("generate",),
    "methods": ("methods",),
}
"""Name of a group for `--suite` -> the ops of its suites."""


def suites() -> dict[str, Suite]:
    """Return every suite by the name of its op."""
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.name.startswith("bench_"))
    found = [importlib.import_module(f"{ops.__name__}.{name}").SUITE for name in names]
    whole = (end_to_end.SUITE, evaluation.SUITE, generation.SUITE, methods.SUITE)
    return {suite.op: suite for suite in (*found, *whole)}
