"""CUDA kernels executed on the CPU: .cu sources through g++, or the PTX that nvcc and Triton emit. docs/gpu_less.md.

library = cuda_host.build([CSRC / "cuda" / "dequantize_nf4.cu"], "plain")
library.call("launch_dequantize_nf4", cuda_host.struct_of("PPPPPqqi0qPi", (packed, ...)), None, seed=3)

module = cuda_host.load_ptx(compiled.asm["ptx"], "asan")
module.launch("kernel_name", grid=(4,), block=(128,), shared=4096, args=(x, cuda_host.out(y), M))
"""

from .build import MODES, PTX_MODES, SOURCE_MODES, build, load_ptx, prebuild
from .library import (
    BankCount,
    KernelFault,
    Library,
    Module,
    RuntimeCall,
    SanitizerReport,
    out,
    pointers,
    shifted,
    struct_of,
)
from .toolchain import missing_tools, nvcc_missing

__all__ = [
    "MODES",
    "PTX_MODES",
    "SOURCE_MODES",
    "BankCount",
    "KernelFault",
    "Library",
    "Module",
    "RuntimeCall",
    "SanitizerReport",
    "build",
    "load_ptx",
    "missing_tools",
    "nvcc_missing",
    "out",
    "pointers",
    "prebuild",
    "shifted",
    "struct_of",
]
