"""The CUDA library: nvcc compiles csrc/cuda for QLORA_CUDA_ARCHS, the host compiler its bindings; needs any torch.

QLORA_CUDA_ARCHS: "80;86;90a", each with "+PTX" for PTX that newer GPUs compile at load time; "all"; or "" for none. If
it is not set: DEFAULT_ARCHS if nvcc is found.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .cuda_toolkit import cuda_home, shared_runtime, version
from .native import CSRC, TARGET_VERSION, CannotBuild, Step, compile_step, tool, torch_paths

ARCHS_VARIABLE = "QLORA_CUDA_ARCHS"
DEFAULT_ARCHS = "80+PTX"
"""A single compilation that every GPU from sm_80 on can load."""

ALL_ARCHS = "80+PTX;86;89;90;100;120+PTX"
"""PTX of 80 serves the GPUs between these, PTX of 120 the later ones."""

SM90A_SOURCES = ("linear_nf4_wgmma",)
"""Sources compiled for sm_90a where 90 or 90a is requested, and otherwise to a stub (QLORA_WITHOUT_SM90A)."""

NO_NVCC = "nvcc is not found; put CUDA 13 on PATH, or run `make setup`."

NVCC_FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")
BINDING_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def requested_archs() -> str:
    """Return QLORA_CUDA_ARCHS, with "all" expanded."""
    stated = os.environ.get(ARCHS_VARIABLE, DEFAULT_ARCHS).strip()
    return ALL_ARCHS if stated == "all" else stated


def gencode(archs: str) -> list[str]:
    """Return nvcc's flags for "80;90a+PTX". Raises ValueError for a string that names no architecture."""
    flags = []
    for arch in filter(None, re.split(r"[;, ]", archs)):
        match = re.fullmatch(r"(\d{2,3}[af]?)(\+PTX)?", arch)
        if match is None:
            raise ValueError(f'{ARCHS_VARIABLE}: must be like "80;86;90a+PTX", "all" or "", got {archs!r}')
        number = match[1]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[2]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def source_flags(stem: str, archs: str) -> list[str]:
    """Return nvcc's flags for one source of csrc/cuda."""
    if stem not in SM90A_SOURCES:
        return gencode(archs)
    return gencode("90a") if holds_sm90a(archs) else [*gencode(archs), "-DQLORA_WITHOUT_SM90A"]


def holds_sm90a(archs: str) -> bool:
    """Whether SM90A_SOURCES are compiled for sm_90a in a build for `archs`."""
    return re.search(r"\b90a?\b", archs) is not None


def local_version() -> str:
    """Return the local version part that names a wheel's CUDA library: "cpu" or "cu130.sm80.sm90a".

    Raises CannotBuild if architectures are requested and nvcc is missing.
    """
    gencode(requested_archs())
    archs = re.findall(r"(\d{2,3}[af]?)", requested_archs())
    if not archs:
        return "cpu"
    home = cuda_home()
    if home is None:
        raise CannotBuild(NO_NVCC)
    return ".".join([f"cu{version(home).replace('.', '')}", *[f"sm{arch}" for arch in archs]])


class CudaLibrary:
    """The library qlora_kernels/backends/cuda/_C.abi3.so and its build steps."""

    name = "qlora_kernels.backends.cuda._C"

    @property
    def required(self) -> bool:
        """Whether architectures were requested, so that a failure to build them is an error."""
        return bool(os.environ.get(ARCHS_VARIABLE))

    def compile_steps(self, build: Path) -> list[Step]:
        """Return one step for each object file."""
        archs = requested_archs()
        if not archs:
            raise CannotBuild(f"{ARCHS_VARIABLE} is empty.")
        if sys.platform != "linux":
            raise CannotBuild(f"The CUDA library is built on Linux, not on {sys.platform}.")
        home = cuda_home()
        if home is None:
            raise CannotBuild(NO_NVCC)
        includes, _ = torch_paths()
        steps = []
        nvcc = (str(home / "bin" / "nvcc"), *NVCC_FLAGS)
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            output = build / "kernels" / f"{source.stem}.o"
            command = (*nvcc, *source_flags(source.stem, archs), f"-I{CSRC / 'include'}")
            steps.append(compile_step(command, source, output))
        compiler = tool("CXX", "c++", "g++", "clang++")
        folders = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}"]
        folders += [f"-isystem{folder}" for folder in (*includes, home / "include", home / "include" / "cccl")]
        define = f'-DQLORA_BUILT_ARCHS="{archs}"'
        for source in sorted((CSRC / "bindings").glob("cuda*.cpp")):
            output = build / "bindings" / f"{source.stem}.o"
            command = (compiler, *BINDING_FLAGS, TARGET_VERSION, define, *folders)
            steps.append(compile_step(command, source, output))
        return steps

    def link_step(self, objects: Sequence[Path], output: Path) -> Step:
        """Return the step that links the objects into the library."""
        home = cuda_home()
        runtime = shared_runtime(home) if home else None
        if runtime is None:
            raise CannotBuild("libcudart.so.13 is not found beside nvcc; install the nvidia-cuda-runtime package.")
        _, library_folder = torch_paths()
        # The runtime is torch's: a CUDA build of torch loads libcudart.so.13 before this library.
        link = (str(runtime), f"-L{library_folder}", "-ltorch_cpu", "-ldl", "-Wl,--no-undefined", "-Wl,--as-needed")
        inputs = tuple(str(path) for path in objects)
        command = (tool("CXX", "c++", "g++", "clang++"), "-shared", *inputs, *link, "-o", str(output))
        return Step(command, output, tuple(objects))
