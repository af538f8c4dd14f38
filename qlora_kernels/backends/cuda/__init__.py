"""Hand-written CUDA kernels (csrc/cuda) behind torch's stable ABI: one library for every torch from 2.10 on.

The library loads into a torch without CUDA too, where its ops can be listed but not run. docs/kernels.md says for which
problems these kernels are the default and for which Triton's are.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch

from ...ops._registry import KernelSpec, Problem, supports_all
from . import managed_memory
from .adamw_step import adamw_step
from .codec import dequantize_nf4, quantize_absmax, quantize_nf4, quantize_nf4_double
from .linear_nf4 import (
    linear_nf4,
    linear_nf4_grad_x,
    linear_nf4_lora,
    linear_nf4_lora_backward,
    linear_nf4_lora_group,
    linear_nf4_lora_group_backward,
)

LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _no_dropout(problem: Problem) -> list[str]:
    if problem.dropout:
        return ["dropout is not fused here; the triton backend's kernels regenerate its mask"]
    return []


KERNELS = (
    *(
        KernelSpec(function.__name__, "cuda", function, supports_all)
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
            managed_memory.managed_prefer_device,
            managed_memory.managed_prefetch,
        )
    ),
    *(
        KernelSpec(function.__name__, "cuda", function, _no_dropout)
        for function in (
            linear_nf4_lora,
            linear_nf4_lora_backward,
            linear_nf4_lora_group,
            linear_nf4_lora_group_backward,
        )
    ),
)


@cache
def load() -> bool:
    """Loads the library, whether or not there is a GPU; False where it is not built.

    Raises OSError, the loader's own, for a library that is there but does not load: that is a broken installation.
    """
    if not LIBRARY.exists():
        return False
    torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    return True


def built_archs() -> str:
    """QLORA_CUDA_ARCHS of the build, like "80;90a+PTX"; "" where the library is not built."""
    return str(torch.ops.qlora_kernels_C.cuda_archs()) if load() else ""


def arch_mismatch(archs: str, capability: tuple[int, int]) -> str | None:
    """Why a library built for `archs` cannot run on a GPU of `capability`, with the fix; None where it can.

    Binaries run on their own architecture and on later ones of the same major version; those marked 'a' or 'f' on their
    own alone, which is what this accepts; PTX runs on everything later.
    """
    major, minor = capability
    for name, ptx in re.findall(r"(\d{2,3}[af]?)(\+PTX)?", archs):
        arch = int(name.rstrip("af"))
        same_major, later = arch // 10 == major, arch <= major * 10 + minor
        exact = arch == major * 10 + minor
        if exact or (later and name.isdigit() and (same_major or ptx)):
            return None
    fix = f"install a wheel for sm_{major}{minor}, or rebuild with QLORA_CUDA_ARCHS={major}{minor}"
    return f"its kernels are built for {archs} and this GPU is sm_{major}{minor}; {fix}"


@cache
def unavailable() -> str | None:
    """Why this backend cannot run here, with the fix; None where it can."""
    if not load():
        return f"{LIBRARY.name} is not built; put CUDA's nvcc on PATH and run `make ext`"
    if not torch.cuda.is_available():
        return f"no CUDA device (the kernels are built, for {built_archs()})"
    return arch_mismatch(built_archs(), torch.cuda.get_device_capability())


__all__ = ["KERNELS", "LIBRARY", "arch_mismatch", "built_archs", "load", "unavailable"]
