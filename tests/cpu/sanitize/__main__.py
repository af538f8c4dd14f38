"""Builds the CPU kernels with sanitizers and runs driver.cpp on every instruction set.

    python -m tests.cpu.sanitize [--thread] [ISA ...]         exit code 1 if a sanitizer or a comparison fails

The sanitizers are AddressSanitizer and UndefinedBehaviorSanitizer, or with --thread ThreadSanitizer. Under the latter,
two threads call the kernels at the same time, and each call uses three threads of its own (std::thread and not OpenMP,
whose barriers the sanitizer does not know).

Instruction sets that this machine lacks are listed and skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from python.build_support.cpu import COMMON_FLAGS, family_of
from python.build_support.native import ROOT, tool
from tests.support.cuda_host.toolchain import fixed_addresses

from .build import build_driver

MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
THREADS = ("-fsanitize=thread", "-fno-omit-frame-pointer", "-g1")
REPLACED = {"-O3": "-O1"}


def main(arguments: list[str]) -> int:
    threads, names = "--thread" in arguments, [name for name in arguments if name != "--thread"]
    sanitizers, folder, callers = (THREADS, "sanitize-thread", "2") if threads else (MEMORY, "sanitize", "1")
    compiler = tool("CXX", "c++", "g++", "clang++")
    flags = tuple(REPLACED.get(flag, flag) for flag in COMMON_FLAGS) + sanitizers
    program = build_driver(compiler, ROOT / "build" / folder, flags, sanitizers)
    failed = False
    family = family_of(compiler)
    chosen = names or (*family.sets, *family.amx)
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    prefix = fixed_addresses() if threads else ()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(run, ([*prefix, str(program), isa, callers] for isa in chosen)))
    for isa, done in zip(chosen, runs, strict=True):
        if "unset it to use the best supported one" in done.stderr:
            sys.stdout.write(f"{isa}: not on this machine\n")
            continue
        sys.stdout.write(done.stdout + done.stderr)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
