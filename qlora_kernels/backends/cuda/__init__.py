"""CUDA kernels (csrc/cuda) behind torch's stable ABI: one library for every torch from 2.10 on.

docs/kernels/cuda.md lists the problems for which these kernels, or Triton's, are the default.
"""

from __future__ import annotations

from ...ops import measured_plans
from ...ops.registry import KernelPlan, KernelSpec, Problem, only_kernel, supports_all
from . import managed_memory
from .adamw_step import adamw_step
from .availability import LIBRARY, library_facts, load, unavailable
from .codec import dequantize_nf4, quantize_absmax, quantize_nf4, quantize_nf4_double
from .linear_nf4 import (
    linear_nf4,
    linear_nf4_grad_x,
    linear_nf4_lora,
    linear_nf4_lora_backward,
    linear_nf4_lora_group,
    linear_nf4_lora_group_backward,
)
from .linear_nf4 import plan as linear_plan
from .linear_nf4_lora_merged import linear_nf4_lora_merged, linear_nf4_lora_merged_backward


def _priority(problem: Problem) -> int:
    """Return the measured priority on this GPU, but less than Triton's with dropout.

    Dropout takes separate passes over [M, K] here, while Triton computes the mask where it reads x.
    """
    return -1 if problem.dropout else measured_plans.priority(problem, "cuda")


def _plan(problem: Problem) -> KernelPlan:
    return linear_plan(problem) if problem.op.startswith("linear_nf4") else only_kernel(problem)


KERNELS = (
    *(
        KernelSpec(function.__name__, "cuda", function, supports_all, _priority, checks_memory=True, plan=_plan)
        for function in (
            quantize_nf4,
            quantize_absmax,
            quantize_nf4_double,
            dequantize_nf4,
            linear_nf4,
            linear_nf4_grad_x,
            adamw_step,
            managed_memory.managed_concurrent_access,
            managed_memory.managed_alloc,
            managed_memory.page_locked_alloc,
            managed_memory.managed_prefer_device,
            managed_memory.managed_prefetch,
        )
    ),
    *(
        KernelSpec(function.__name__, "cuda", function, supports_all, _priority, plan=_plan)
        for function in (
            linear_nf4_lora,
            linear_nf4_lora_backward,
            linear_nf4_lora_group,
            linear_nf4_lora_group_backward,
            linear_nf4_lora_merged,
            linear_nf4_lora_merged_backward,
        )
    ),
)


__all__ = ["KERNELS", "LIBRARY", "library_facts", "load", "unavailable"]
