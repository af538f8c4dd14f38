"""Runs launchers of csrc/cuda in every mode and several schedules, and compares results of nvcc's PTX bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from python.build_support.cuda_toolkit import cuda_home, shared_runtime
from qlora_kernels.backends import cuda
from qlora_kernels.format import double_quant, reference
from qlora_kernels.format.quant_state import DTYPE_CODES
from tests.support import cuda_host
from tests.support.cuda_host.toolchain import ROOT

CUDA_SOURCES = ROOT / "csrc" / "cuda"
FLOAT_TYPES = DTYPE_CODES

needs_emulator = pytest.mark.skipif(cuda_host.missing_tools() is not None, reason=str(cuda_host.missing_tools()))
needs_nvcc = pytest.mark.skipif(cuda_host.nvcc_missing() is not None, reason=str(cuda_host.nvcc_missing()))

needs_library = pytest.mark.skipif(
    not cuda.LIBRARY.exists(), reason=f"{cuda.LIBRARY.name} is not built: put nvcc on PATH and run `make ext`"
)

all_modes = pytest.mark.parametrize("mode", ["plain", "asan", "tsan", pytest.param("ptx", marks=needs_nvcc)])
ptx_under_sanitizers = pytest.mark.parametrize("mode", ["ptx-asan", "ptx-tsan"])
source_and_ptx = pytest.mark.parametrize("mode", ["plain", pytest.param("ptx", marks=needs_nvcc)])
SCHEDULES = (("random", 1), ("random", 2), ("forward", 1), ("reverse", 1))

PTX_KERNELS = {
    "linear_nf4_small_m": "kernelI(13__nv_bfloat16Li[148]E|fLi(1|16)E|6__halfLi(2|16)E)",
    "linear_nf4_pairs": "kernelI13__nv_bfloat16Li(8ELb[01]|24ELb[01]|32ELb1)E",
    "linear_nf4_gemm": "gemm_kernelI(13__nv_bfloat16Li(16|64)E|6__halfLi32E|6__halfLi64E.*Forward)|reduce_kernel",
}
"""Mangled names of the kernels that tests launch from PTX, by source; all kernels of sources that are not listed."""

SANITIZED_PTX_KERNELS = {
    "linear_nf4_small_m": "kernelI13__nv_bfloat16Li4E",
    "linear_nf4_pairs": "kernelI13__nv_bfloat16Li8ELb1E",
    "linear_nf4_gemm": "(gemm_kernelI13__nv_bfloat16Li16E|reduce_kernelI13__nv_bfloat16)",
    "linear_nf4_wgmma": "(wgmma_kernelI13__nv_bfloat16Li64E|reduce_kernelI13__nv_bfloat16)",
    "quantize_nf4": "(quantize_nf4_kernelI13__nv_bfloat16|absmax_kernel)",
    "dequantize_nf4": "I13__nv_bfloat16",
    "lora_down": "I13__nv_bfloat16Li2ELb1ELb1E",
    "merge_lora": "I13__nv_bfloat16Li1E",
}
"""The same under sanitizers: one instance of each kernel."""

Constants = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@cache
def source(stem: str) -> tuple:  # type: ignore[type-arg]
    return (CUDA_SOURCES / f"{stem}.cu",)


def runtime_to_preload() -> list[str]:
    """Return the toolkit's libcudart if torch has none; the compiled library is loaded after it."""
    home = cuda_home()
    runtime = None if torch.version.cuda or home is None else shared_runtime(home)
    return [] if runtime is None else [str(runtime)]


def load_bindings() -> None:
    """Load the compiled library, which the package itself loads only under a CUDA build of torch."""
    for path in runtime_to_preload():
        ctypes.CDLL(path)
    cuda.load()


def library(stem: str, mode: str) -> cuda_host.Library:
    """Return csrc/cuda/<stem>.cu built for `mode`."""
    return cuda_host.build(source(stem), mode, kernels=kernels_of(stem, mode))


def kernels_of(stem: str, mode: str) -> str:
    """Return the kernels of csrc/cuda/<stem>.cu that are translated for `mode`."""
    if mode not in cuda_host.PTX_MODES:
        return ""
    return (PTX_KERNELS if mode == "ptx" else SANITIZED_PTX_KERNELS).get(stem, "")


def over_schedules(mode: str, run: Callable[[str, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return run(order, seed); in plain mode, run every schedule and require the same bits."""
    schedules = SCHEDULES if mode == "plain" else SCHEDULES[:1]
    first, *others = [run(order, seed) for order, seed in schedules]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert same_bits(a, b), "the result depends on the schedule"
    return first


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal bytes, NaNs included."""
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory filled with 0xFF, which is NaN in every float type, to detect unwritten elements."""
    return (
        torch.full((max(torch.Size(shape).numel(), 1) * dtype.itemsize,), 0xFF, dtype=torch.uint8)[
            : torch.Size(shape).numel() * dtype.itemsize
        ]
        .view(dtype)
        .view(shape)
    )


def quantized(w: Tensor, blocksize: int, double: bool) -> tuple[Tensor, Constants, Tensor]:
    """Return the reference's (packed, constants, first-level absmax)."""
    packed, absmax = reference.quantize_nf4(w, blocksize)
    if not double:
        return packed, (absmax, None, None, None), absmax
    nested = double_quant.quantize_absmax(absmax)
    return packed, (None, *nested), double_quant.dequantize_absmax(*nested)


def shift(blocksize: int) -> int:
    """Return log2(blocksize)."""
    return blocksize.bit_length() - 1
