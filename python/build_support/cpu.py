"""The CPU library: kernels compiled once per instruction set, one shared object over torch's stable ABI.

Each file of csrc/cpu that includes simd.h (directly or indirectly) is a kernel. It is compiled with QLORA_ISA set to
the instruction set, which is also the namespace. No two copies share a symbol, and wide instructions cannot get into
code that runs on a smaller CPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .native import CSRC, TARGET_VERSION, CannotBuild, Step, compile_step, tool, torch_paths

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
X86_FLAGS = {"portable": (), "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": (*_AVX512, "-mavx512bf16")}
# NEON is part of the base architecture: the compiler needs no flag for it, but simd.h needs a macro.
ARM_FLAGS = {"portable": (), "neon": ("-DQLORA_NEON",)}
# The sources of csrc/cpu/amx. The tile instructions are inline assembly, so the compiler needs no flag for them.
AMX_FLAGS = {
    "amx_bf16": X86_FLAGS["avx512_bf16"],
    "amx_bf16_emulated": (*X86_FLAGS["avx512_bf16"], "-DQLORA_EMULATE_AMX"),
}

COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the codec rounds products and sums separately; kernels fuse explicitly
    "-fno-math-errno",  # compiles sqrtf to an instruction, also in vectors
    "-Wall",
    "-Wextra",
    "-Wno-unknown-warning-option",  # clang does not know all of the following warnings
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # gcc 12 warns about its own AVX-512 headers, with both warnings
    "-Wno-uninitialized",
)


@dataclass(frozen=True)
class Family:
    """The CPUs of one architecture.

    defines: compiler flags for all sources.   sets: instruction set -> compiler flags for the kernels of csrc/cpu.
    amx: the same for the kernels of csrc/cpu/amx.
    """

    defines: tuple[str, ...]
    sets: dict[str, tuple[str, ...]]
    amx: dict[str, tuple[str, ...]] = field(default_factory=dict)


X86 = Family(("-DQLORA_X86_KERNELS",), X86_FLAGS, AMX_FLAGS)
ARM = Family(("-DQLORA_ARM_KERNELS",), ARM_FLAGS)
OTHER = Family((), {"portable": ()})


@cache
def family_of(compiler: str) -> Family:
    """Return the target of `compiler` by its own report, because a cross compiler's target is not this machine."""
    done = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=False)
    architecture = done.stdout.strip().partition("-")[0]
    return {"x86_64": X86, "aarch64": ARM, "arm64": ARM}.get(architecture, OTHER)


def is_kernel(source: Path) -> bool:
    """Whether a source of csrc/cpu is compiled once per instruction set."""
    return re.search(r"\bQLORA_ISA\b", source.read_text(encoding="utf-8")) is not None


def kernel_commands(compiler: str, build: Path, flags: Sequence[str]) -> list[Step]:
    """Return the steps for all objects of csrc/cpu, which the sanitizer driver (tests/cpu/sanitize) uses too."""
    family = family_of(compiler)
    steps = []
    # On other families, support.cpp of csrc/cpu/amx reports that there is no AMX.
    for source in (*sorted((CSRC / "cpu").glob("*.cpp")), *sorted((CSRC / "cpu" / "amx").glob("*.cpp"))):
        sets = family.amx if source.parent.name == "amx" else family.sets
        variants = sets if is_kernel(source) else {"": ()}
        for name, isa_flags in variants.items():
            define = (f"-DQLORA_ISA={name}",) if name else ()
            output = build / (name or "common") / f"{source.stem}.o"
            include = f"-I{CSRC / 'include'}"
            defines = (*family.defines, *define)
            command = (compiler, *flags, *isa_flags, *defines, include)
            steps.append(compile_step(command, source, output))
    return steps


class CpuLibrary:
    """The library qlora_kernels/backends/cpu/_C.abi3.so and its build steps."""

    name = "qlora_kernels.backends.cpu._C"
    required = False

    def compile_steps(self, build: Path) -> list[Step]:
        """Return one step for each object file."""
        if sys.platform not in ("linux", "darwin"):
            raise CannotBuild(f"The native CPU library is built on Linux and macOS, not on {sys.platform}.")
        compiler = tool("CXX", "c++", "g++", "clang++")
        includes, _ = torch_paths()
        steps = kernel_commands(compiler, build, COMMON_FLAGS)
        for source in sorted((CSRC / "bindings").glob("cpu*.cpp")):
            output = build / "bindings" / f"{source.stem}.o"
            folders = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}", *(f"-isystem{folder}" for folder in includes)]
            steps.append(compile_step((compiler, *COMMON_FLAGS, TARGET_VERSION, *folders), source, output))
        return steps

    def link_step(self, objects: Sequence[Path], output: Path) -> Step:
        """Return the step that links the objects into the library."""
        _, library_folder = torch_paths()
        # torch_cpu has the C functions of the stable ABI; it is loaded before this library.
        link: tuple[str, ...] = ("-shared", f"-L{library_folder}", "-ltorch_cpu")
        if sys.platform == "linux":
            link = (*link, "-Wl,--no-undefined", "-Wl,--as-needed")
        else:
            # macOS searches @rpath/libtorch_cpu.dylib beside the installed package and in the torch of this build.
            link = (*link, "-Wl,-rpath,@loader_path/../../../torch/lib", f"-Wl,-rpath,{library_folder}")
        inputs = tuple(str(path) for path in objects)
        command = (tool("CXX", "c++", "g++", "clang++"), *inputs, *link, "-o", str(output))
        return Step(command, output, tuple(objects))
