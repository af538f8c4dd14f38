"""Every save under faults of system calls: python -m tests.io.failing_files [--step N]

tests/io/faults.py injects faults before Python's file operations. Here the n-th call of the C library on a file below
the folder (open, write, mkdir, rename, renameat2, unlink, fsync, ...) fails or ends the process, whether Python, torch
or the Rust code of safetensors and tokenizers makes it. interpose.cpp is preloaded into a child process for this.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from python.build_support.native import ROOT, tool
from tests.io.fault_injection import ERRORS, Fault
from tests.support.preload import with_preloaded

FAULTS = (Fault.KILL, Fault.ERROR, Fault.FULL, Fault.READ_ONLY)
PERSISTS = {Fault.FULL: 2, Fault.READ_ONLY: 1}
"""Kinds of calls (interpose.cpp) that keep failing."""
BUILD = ROOT / "build" / "failing_files"
NOT_REACHED, OTHER_ERROR = 10, 11


def build() -> Path:
    """Compile interpose.cpp to a shared library."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / "interpose.so"
    source = Path(__file__).with_name("interpose.cpp")
    command = (tool("CXX", "c++", "g++", "clang++"), "-std=c++20", "-O1", "-fPIC", "-shared")
    subprocess.run((*command, str(source), "-ldl", "-o", str(library)), check=True)
    return library


def hit(action: Callable[[], object], folder: Path, fault: Fault, n: int) -> bool:
    """Run `action` in a child with a fault at its n-th call on files below `folder`. Returns whether there was one.

    Raises AssertionError if the action ended in anything but the fault or success.
    """
    child = os.fork()
    if child == 0:
        os._exit(_child(action, folder, fault, n))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert fault is Fault.KILL, f"died of signal {os.WTERMSIG(status)}"
        return True
    code = os.WEXITSTATUS(status)
    assert code in (0, NOT_REACHED), f"{fault} at call {n}: see the traceback above"
    return code == 0


def _child(action: Callable[[], object], folder: Path, fault: Fault, n: int) -> int:
    library = ctypes.CDLL(None)
    library.file_calls.restype = ctypes.c_long
    code = ERRORS.get(fault, 0)
    library.arm_files(os.fsencode(folder), ctypes.c_long(n), code, PERSISTS.get(fault, 3))
    try:
        action()
    except BaseException as error:
        reason = f"{error} {error.__cause__}"
        if not any(os.strerror(code) in reason for code in ERRORS.values()):
            traceback.print_exc()
            return OTHER_ERROR
    return 0 if library.file_calls() >= n else NOT_REACHED


def main() -> int:
    """Print a table of docs/reliability.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, default=1, help="hit every STEP-th call")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child:
        command = [sys.executable, "-W", "ignore", "-m", "tests.io.failing_files", "--child", "--step"]
        return subprocess.run([*command, str(options.step)], env=with_preloaded(build()), check=False).returncode
    from tests.io.faults import SAVES, inject_runs

    started, total = time.perf_counter(), 0
    print("| save | " + " | ".join(fault.value for fault in FAULTS) + " | lost |")
    print("|---" * (len(FAULTS) + 2) + "|")
    for save in SAVES:
        counts = []
        for fault in FAULTS:

            def runs(write: Callable[[], object], folder: Path, fault: Fault = fault) -> Iterator[str]:
                n = 1
                while hit(write, folder, fault, n):
                    yield f"{fault.value} at system call {n}"
                    n += options.step

            counts.append(inject_runs(save, runs))
        total += sum(counts)
        print(f"| {save.name} | " + " | ".join(map(str, counts)) + " | 0 |", flush=True)
    print(f"\n{total} system calls hit, lost: 0, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
