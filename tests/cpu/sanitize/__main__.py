"""Build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run driver.cpp on every ISA.

    python -m tests.cpu.sanitize [ISA ...]         exit code 1 where a sanitizer or a comparison objects

Instruction sets that this machine lacks are named and left out.
"""

from __future__ import annotations

import subprocess
import sys

from python.build_support.cpu import COMMON_FLAGS, family_of
from python.build_support.native import ROOT, tool

from .build import build_driver

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
REPLACED = {"-O3": "-O1"}


def main(names: list[str]) -> int:
    compiler = tool("CXX", "c++", "g++", "clang++")
    flags = tuple(REPLACED.get(flag, flag) for flag in COMMON_FLAGS) + SANITIZERS
    program = build_driver(compiler, ROOT / "build" / "sanitize", flags, SANITIZERS)
    failed = False
    family = family_of(compiler)
    for isa in names or (*family.sets, *family.amx):
        done = subprocess.run([str(program), isa], capture_output=True, text=True, check=False)
        if "unset it to use the best one there is" in done.stderr:
            sys.stdout.write(f"{isa}: not on this machine\n")
            continue
        sys.stdout.write(done.stdout + done.stderr)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
