"""Compiles the CPU library with all planted faults."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from python.build_support.cpu import COMMON_FLAGS, CpuLibrary, Family, family_of, is_kernel
from python.build_support.native import CSRC, Step, tool
from tests.support import planted_source
from tests.support.cuda_host.build import cached, run_compiler
from tests.support.cuda_host.toolchain import versions
from tests.support.planted_source import NONE, VARIABLE, with_fault

from .fault import Fault

_DECLARATION = "planted_fault.h"
_DEFINITION = "planted_fault.cpp"


def build(faults: Sequence[Fault], sets: Iterable[str]) -> Path:
    """Return the library, compiled if needed: fault i is active while planted_fault equals i + 1.

    sets: the instruction sets that are compiled. The tables of the others are empty and must not be used.
    """
    wanted = sorted(sets)
    texts = [text for fault in faults for text in (fault.file, fault.right, fault.wrong)]
    digest = hashlib.sha256("\n".join([versions(), *wanted, *texts]).encode())
    read = [path for folder in ("bindings", "cpu", "include") for path in (CSRC / folder).rglob("*") if path.is_file()]
    for path in (Path(__file__), Path(planted_source.__file__), *sorted(read)):
        digest.update(path.read_bytes())
    return (
        cached(f"planted-cpu-{digest.hexdigest()[:24]}", "", lambda folder: _make(folder, faults, wanted))
        / "_C.abi3.so"
    )


def _make(folder: Path, faults: Sequence[Fault], sets: Sequence[str]) -> None:
    sources = folder / "csrc"
    for part in ("bindings", "cpu", "include"):
        shutil.copytree(CSRC / part, sources / part)
    for number, fault in enumerate(faults, NONE + 1):
        path = sources / "cpu" / fault.file
        text = path.read_text(encoding="utf-8")
        text = with_fault(text, f"csrc/cpu/{fault.file}", fault.right, fault.wrong, number)
        path.write_text(text, encoding="utf-8")
    # Visible outside of the library, so that the compiler does not know its value and the command can set it.
    (folder / _DECLARATION).write_text(f'extern "C" __attribute__((visibility("default"))) int {VARIABLE};\n')
    compiler = tool("CXX", "c++", "g++", "clang++")
    (folder / _DEFINITION).write_text(_definition(family_of(compiler), sets))

    library = CpuLibrary()
    objects = folder / "objects"
    steps = [
        step for step in library.compile_steps(objects) if step.output.parent.name in (*sets, "common", "bindings")
    ]
    commands = [_moved(step, folder, sources) for step in steps]
    definition = objects / "planted_fault.o"
    includes = (f"-I{folder}", f"-I{sources / 'cpu'}", f"-I{sources / 'include'}")
    commands.append(
        [compiler, "-std=c++20", "-fPIC", *includes, "-c", str(folder / _DEFINITION), "-o", str(definition)]
    )
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(run_compiler, commands))
    link = library.link_step([*(step.output for step in steps), definition], folder / "_C.abi3.so")
    run_compiler(list(link.command))
    for part in (sources, objects):
        shutil.rmtree(part)


def _moved(step: Step, folder: Path, sources: Path) -> list[str]:
    """Return the command of `step` for the changed sources: quickly compiled, with the variable declared."""
    (source,) = step.inputs
    optimized = "-O1" if is_kernel(source) else "-O0"
    words = [word.replace(str(CSRC), str(sources)) for word in step.command]
    return [
        *(word for word in words if word not in COMMON_FLAGS or not word.startswith("-O")),
        optimized,
        "-w",
        "-include",
        str(folder / _DECLARATION),
    ]


def _definition(family: Family, sets: Sequence[str]) -> str:
    """Return the source with the variable, and with empty tables of the instruction sets that are not compiled."""
    table = "extern const Kernels kKernels; const Kernels kKernels{};"
    function = "const Kernels& kernels(); const Kernels& kernels() { static const Kernels none{}; return none; }"
    empty = [
        f"namespace qlora::{name} {{ {definition} }}"
        for names, definition in ((family.sets, table), (family.amx, function))
        for name in names
        if name not in sets
    ]
    lines = ('#include "kernels.h"', f'#include "{_DECLARATION}"', f"int {VARIABLE} = {NONE};", *empty)
    return "\n".join(lines) + "\n"
