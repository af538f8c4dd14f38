"""Triton kernels for CUDA tensors and, under TRITON_INTERPRET=1, for CPU tensors, interpreted.

Importing this module does not import triton; the first run of a kernel does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...ops import measured_plans
from ...ops.registry import KernelPlan, KernelSpec, Problem, only_kernel
from . import planner

_MODULES = {
    "dequantize_nf4": "dequantize_nf4",
    "quantize_nf4": "quantize_nf4",
    "quantize_absmax": "quantize_absmax",
    "linear_nf4": "linear_nf4",
    "linear_nf4_grad_x": "linear_nf4",
    "linear_nf4_lora": "linear_nf4_lora",
    "linear_nf4_lora_backward": "linear_nf4_lora",
    "linear_nf4_lora_merged": "linear_nf4_lora_merged",
    "linear_nf4_lora_merged_backward": "linear_nf4_lora_merged",
    "linear_nf4_lora_group": "linear_nf4_lora_group",
    "linear_nf4_lora_group_backward": "linear_nf4_lora_group",
    "linear_nf4_multi_lora": "linear_nf4_multi_lora",
    "linear_nf4_multi_lora_backward": "linear_nf4_multi_lora",
    "rms_norm": "rms_norm",
    "rms_norm_backward": "rms_norm",
    "rope": "rope",
    "glu": "glu",
    "glu_backward": "glu",
    "linear_cross_entropy": "linear_cross_entropy",
}
"""Op -> the module of this package whose launcher has the op's name."""

OLDEST_CAPABILITY = (8, 0)


def unavailable() -> str | None:
    """Return why this backend cannot run here, with the fix, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'qlora_kernels[triton]'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device; set TRITON_INTERPRET=1 before the first import to interpret the kernels on the CPU"
    if torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return f"the device is older than compute capability {OLDEST_CAPABILITY}"
    return None


def _unsupported(problem: Problem) -> list[str]:
    if problem.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return ["CPU tensors need TRITON_INTERPRET=1, set before the first import"]
    return []


def _launcher(op: str) -> Callable[..., Any]:
    module: ModuleType | None = None

    def launch(*args: Any, **kwargs: Any) -> Any:
        nonlocal module
        if module is None:
            module = importlib.import_module(f"{__name__}.{_MODULES[op]}")
        run, on = getattr(module, op), args[0]
        if type(on) is not Tensor and not isinstance(on, Tensor):
            on = on[0]  # the first tensor of a bundle or list
        if not on.is_cuda or on.get_device() == torch.cuda.current_device():
            return run(*args, **kwargs)
        with torch.cuda.device_of(on):  # Triton launches on the current device
            return run(*args, **kwargs)

    launch.__name__ = f"launch_{op}"
    return launch


def _plan(problem: Problem) -> KernelPlan:
    """Return the plan of the base matmul, and with an adapter where its term is added."""
    if not problem.op.startswith("linear_nf4"):
        return only_kernel(problem)
    capability = planner.capability_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return planner.lora_plan(problem, capability)


def _priority(problem: Problem) -> int:
    """As measured on this GPU."""
    return measured_plans.priority(problem, "triton")


KERNELS = tuple(KernelSpec(op, "triton", _launcher(op), _unsupported, _priority, plan=_plan) for op in _MODULES)
