"""Build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run driver.cpp on every ISA.

    python -m tests.cpu.sanitize [ISA ...]         exit code 1 where a sanitizer or a comparison objects

Instruction sets that this machine lacks are named and left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from python.build_support.cpu import COMMON_FLAGS, instruction_sets, kernel_commands
from python.build_support.native import CSRC, ROOT, Step, headers, tool

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
REPLACED = {"-O3": "-O1"}


def build(folder: Path) -> Path:
    """The driver, compiled and linked."""
    compiler = tool("CXX", "c++", "g++", "clang++")
    flags = tuple(REPLACED.get(flag, flag) for flag in COMMON_FLAGS) + SANITIZERS
    steps = kernel_commands(compiler, folder, flags)
    source = Path(__file__).with_name("driver.cpp")
    output = folder / "driver.o"
    includes = (f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}")
    steps.append(
        Step((compiler, *flags, *includes, "-c", str(source), "-o", str(output)), output, (source, *headers()))
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(Step.run, steps))
    program = folder / "driver"
    objects = tuple(step.output for step in steps)
    Step((compiler, *SANITIZERS, *map(str, objects), "-pthread", "-o", str(program)), program, objects).run()
    return program


def main(names: list[str]) -> int:
    program = build(ROOT / "build" / "sanitize")
    failed = False
    for isa in names or instruction_sets():
        done = subprocess.run([str(program), isa], capture_output=True, text=True, check=False)
        if "lacks it" in done.stderr:
            sys.stdout.write(f"{isa}: not on this machine\n")
            continue
        sys.stdout.write(done.stdout + done.stderr)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
