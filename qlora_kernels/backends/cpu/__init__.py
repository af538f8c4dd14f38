"""The native CPU backend: C++ kernels (csrc/cpu) in one library for every torch from 2.10 on.

The library chooses its instruction set at first use: amx_bf16, avx512_bf16, avx512 or avx2 on x86, neon on AArch64, and
portable code elsewhere. QLORA_CPU_ISA forces one; only csrc/cpu/isa.cpp reads it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ...ops import composed_merged_lora, composed_multi_lora, native_library
from ...ops.registry import KernelPlan, KernelSpec, Problem, supports_all
from . import blocks
from .adamw_step import adamw_step
from .elementwise import glu, glu_backward, rms_norm, rms_norm_backward, rope
from .kernels import (
    attention,
    attention_backward,
    dequantize_nf4,
    linear_cross_entropy,
    linear_nf4,
    linear_nf4_grad_x,
    linear_nf4_lora,
    linear_nf4_lora_backward,
    linear_nf4_lora_group,
    linear_nf4_lora_group_backward,
    quantize_absmax,
    quantize_nf4,
    quantize_nf4_double,
)
from .planner import plan

LIBRARY = Path(__file__).with_name("_C.abi3.so")

_FUNCTIONS = (
    quantize_nf4,
    quantize_absmax,
    quantize_nf4_double,
    dequantize_nf4,
    linear_nf4,
    linear_nf4_grad_x,
    linear_nf4_lora,
    linear_nf4_lora_backward,
    linear_nf4_lora_group,
    linear_nf4_lora_group_backward,
    adamw_step,
    linear_cross_entropy,
    rms_norm,
    rms_norm_backward,
    rope,
    glu,
    glu_backward,
    attention,
    attention_backward,
)


def _plan(problem: Problem) -> KernelPlan:
    """Return the kernel and tile on the instruction set in use; without the library, on avx512_bf16."""
    return plan(problem, instruction_set() if unavailable() is None else "avx512_bf16")


_PARTLY_TORCH = (
    *composed_multi_lora.compose_multi_lora(linear_nf4, linear_nf4_grad_x),
    *composed_merged_lora.compose_lora_merged(dequantize_nf4),
)
_BLOCKS = (blocks.gated_mlp, blocks.gated_mlp_backward, blocks.lora_attention, blocks.lora_attention_backward)
KERNELS = (
    *(
        KernelSpec(function.__name__, "cpu", function, supports_all, checks_memory=True, plan=_plan)
        for function in _FUNCTIONS
    ),
    *(KernelSpec(function.__name__, "cpu", function, supports_all) for function in _PARTLY_TORCH),
    *(KernelSpec(function.__name__, "cpu", function, blocks.unsupported, checks_memory=True) for function in _BLOCKS),
)


@cache
def unavailable() -> str | None:
    """Return why this backend cannot run here, with the fix, or None if it can. Loads the library.

    Raises OSError for a library that exists but does not load, which is a broken installation.
    """
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built; install a C++ compiler and run `make ext`"
    native_library.load(LIBRARY)
    return None


def instruction_set(force: str | None = None) -> str:
    """Return the instruction set in use, after changing it to `force` if given ("" restores the automatic choice).

    Raises RuntimeError if the library is not built, and ValueError if the name in QLORA_CPU_ISA or `force` is unknown
    or cannot run here.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(f"cpu backend: {reason}")
    try:
        return str(torch.ops.qlora_kernels_C.cpu_isa(force))
    except RuntimeError as error:
        # Some versions of torch translate std::invalid_argument to RuntimeError, others to ValueError.
        raise ValueError(str(error)) from None


def instruction_set_reason() -> str:
    """Return in one sentence why the instruction set in use was chosen.

    Raises RuntimeError if the library is not built.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(f"cpu backend: {reason}")
    return str(torch.ops.qlora_kernels_C.cpu_isa_reason())


def amx_unavailable() -> str | None:
    """Return in one sentence why this process cannot use AMX tiles, or None if it can.

    Raises RuntimeError if the library is not built.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(f"cpu backend: {reason}")
    return torch.ops.qlora_kernels_C.cpu_amx_unavailable() or None


def library_facts() -> dict[str, str]:
    """Return the instruction set in use, why it was chosen, and whether AMX can be used."""
    return {
        "kernels use": native_library.fact(instruction_set),
        "because": native_library.fact(instruction_set_reason),
        "amx": native_library.fact(lambda: amx_unavailable() or "usable"),
    }


__all__ = [
    "KERNELS",
    "LIBRARY",
    "amx_unavailable",
    "instruction_set",
    "instruction_set_reason",
    "library_facts",
    "unavailable",
]
