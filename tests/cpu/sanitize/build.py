"""Compiles the driver: the CPU kernels of all instruction sets of a compiler's target, without torch and Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from python.build_support.cpu import kernel_commands
from python.build_support.native import CSRC, Step, compile_step

SOURCES = Path(__file__).parent


def build_driver(compiler: str, folder: Path, flags: Sequence[str], link_flags: Sequence[str]) -> Path:
    """Compile the program in `folder`. Usage: PROGRAM ISA; exit code 1 if a comparison fails."""
    steps = kernel_commands(compiler, folder, flags)
    includes = (f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}")
    for source in sorted(SOURCES.glob("*.cpp")):
        # GCC 12 for AArch64 fails with an internal error when it vectorizes some of the references.
        command = (compiler, *flags, "-fno-tree-vectorize", *includes)
        steps.append(compile_step(command, source, folder / f"{source.stem}.o"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(Step.run, steps))
    program = folder / "driver"
    objects = tuple(step.output for step in steps)
    Step((compiler, *link_flags, *map(str, objects), "-pthread", "-o", str(program)), program, objects).run()
    return program
