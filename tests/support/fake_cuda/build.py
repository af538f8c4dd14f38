"""Compiles the fake driver, the fake runtime and the project's kernels to one folder, cached by content.

    python -m tests.support.fake_cuda.build        prints the folder

It runs in a separate process, because it imports torch, which must not be loaded before the fake device. The kernels of
SM90A_SOURCES take three minutes more, and are compiled where the project's library holds them.
`module_library` is for PTX that a program loads later.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from python.build_support.cuda import SM90A_SOURCES
from qlora_kernels.backends.cuda.availability import holds_sm90a
from tests.support.cuda_host import nvcc_missing
from tests.support.cuda_host.build import cached, run_compiler, translated_kernels, translated_text
from tests.support.cuda_host.ptx.parser import Parameter
from tests.support.cuda_host.toolchain import ROOT, cuda_includes, versions

from .stubs import driver_stubs, runtime_stubs

DRIVER, RUNTIME, KERNELS = "libcuda.so.1", "libcudart.so.13", "libkernels.so"

_HERE = Path(__file__).parent
_SOURCES = _HERE / "src"
_EMULATOR = _HERE.parent / "cuda_host"
_COMMON = ("-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-shared")


def build() -> Path:
    """Return the folder with the three libraries, made if needed. Raises CompilerError."""
    if (missing := nvcc_missing()) is not None:
        raise FileNotFoundError(missing)
    digest, kernels = hashlib.sha256(versions().encode()), _kernels()
    inputs = [*kernels, *(ROOT / "csrc" / "include").rglob("*.cuh"), *(ROOT / "csrc" / "cuda").glob("*.cuh")]
    inputs += [path for folder in (_HERE, _EMULATOR) for path in folder.rglob("*") if path.suffix in _SUFFIXES]
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    return cached(f"fake_cuda-{digest.hexdigest()[:24]}", "", partial(_make, kernels))


_SUFFIXES = {".py", ".h", ".cpp", ".map"}


def _kernels() -> list[Path]:
    """Return the sources of the kernels that the project's library holds."""
    sources = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if "__global__" in path.read_text()]
    return [path for path in sources if path.stem not in SM90A_SOURCES or holds_sm90a()]


def _make(kernels: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    include, _ = cuda_includes()
    _libraries(folder, include)
    objects, parameters = translated_kernels(kernels)
    _kernel_library(folder, folder, objects, parameters)


def module_library(ptx: str, driver_folder: Path) -> Path:
    """Return a library of the kernels in PTX text, cached by content. Raises CompilerError.

    driver_folder: the folder of libcuda.so.1.
    """
    objects, parameters = translated_text([ptx])
    inputs = [*map(str, objects), *(path.read_text() for path in sorted(_SOURCES.glob("kernels*"))), ptx]
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:24]

    def make(folder: Path) -> None:
        folder.mkdir()
        _kernel_library(folder, driver_folder, objects, parameters)

    return cached(f"module-{key}", "", make) / KERNELS


def _libraries(folder: Path, include: Path) -> None:
    """Compile libcuda.so.1 and libcudart.so.13, which is linked to it."""
    compiler = ["g++", "-std=c++20", *_COMMON, f"-isystem{include}", f"-I{_EMULATOR / 'include'}"]
    for name, source in ((DRIVER, driver_stubs(include)), (RUNTIME, runtime_stubs(include))):
        stubs = folder / f"{name}.stubs.c"
        stubs.write_text(source)
        run_compiler(["gcc", "-fPIC", "-c", f"-I{_SOURCES}", str(stubs), "-o", str(stubs.with_suffix(".o"))])
    driver: list[Path | str] = [
        _SOURCES / f"{stem}.cpp" for stem in ("control", "devices", "kernels", "memory", "streams", "tensor_maps")
    ]
    driver += [folder / f"{DRIVER}.stubs.o", "-ldl", "-o", folder / DRIVER]
    run_compiler([*compiler, f"-Wl,-soname,{DRIVER}", *map(str, driver)])
    runtime: list[Path | str] = [*sorted(_SOURCES.glob("runtime_*.cpp")), folder / f"{RUNTIME}.stubs.o"]
    runtime += [f"-Wl,--version-script={_SOURCES / 'runtime.map'}", "-Wl,-rpath,$ORIGIN"]
    runtime += [f"-L{folder}", f"-l:{DRIVER}", "-o", folder / RUNTIME]
    run_compiler([*compiler, f"-Wl,-soname,{RUNTIME}", *map(str, runtime)])


def _kernel_library(
    folder: Path, driver_folder: Path, objects: Sequence[Path], parameters: Mapping[str, Sequence[Parameter]]
) -> None:
    table = folder / "kernel_parameters.cpp"
    rows = [
        f'{{"{name}", {{{", ".join(f"{{{p.offset}, {p.bytes}, {{{str(p.words)[1:-1]}}}}}" for p in declared)}}}}},'
        for name, declared in parameters.items()
    ]
    table.write_text(
        '#include "kernels_of_project.h"\n'
        "const std::vector<KernelParameters>& kernel_parameters() {\n"
        f"static const std::vector<KernelParameters> all{{\n{chr(10).join(rows)}\n}};\nreturn all;\n}}\n"
    )
    # Each library contains an emulator with CUDA runtime functions, whose symbols the version script hides.
    command = ["g++", "-std=c++20", *_COMMON, "-fvisibility=default", f"-I{_SOURCES}"]
    command += [f"-Wl,--version-script={_SOURCES / 'kernels.map'}"]
    sources = [str(_SOURCES / "kernels_of_project.cpp"), str(table)]
    link = [f"-L{driver_folder}", f"-l:{DRIVER}", "-Wl,-rpath,$ORIGIN", "-ldl", "-o", str(folder / KERNELS)]
    run_compiler([*command, *sources, *map(str, objects), *link])


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
