"""Every allocation of the CPU library is made to fail once; calls must raise and later results must be right.

    python -m tests.cpu.failing_allocator [--threads N]      exit code 1 if the process dies or a result is wrong

The allocator is replaced by preloading interpose.cpp into a child process. Allocations of tensors by torch (libc10) are
included.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from python.build_support.native import ROOT, tool
from tests.support.preload import with_preloaded

WATCHED = (b"backends/cpu/_C.abi3.so", b"libc10.so")
FOLDER = ROOT / "build" / "failing_allocator"


def build() -> Path:
    """Compile interpose.cpp to a shared library."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / "interpose.so"
    source = Path(__file__).with_name("interpose.cpp")
    command = (tool("CXX", "c++", "g++", "clang++"), "-std=c++20", "-O1", "-fPIC", "-shared")
    subprocess.run((*command, str(source), "-ldl", "-o", str(library)), check=True)
    return library


def calls() -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """Yield (name, call) of each native op, with workspaces of every size."""
    import torch

    C = torch.ops.qlora_kernels_C
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    w = normal(96, 64)
    weight = C.cpu_quantize_nf4_double(w, 64)
    packed, constants = weight[0], (None, *weight[2:])
    lora_A, lora_B, seed = normal(4, 64), normal(96, 4), torch.tensor([3])
    yield "quantize_nf4_double", lambda: list(C.cpu_quantize_nf4_double(w, 64))

    def dequantize() -> list[Any]:
        out = torch.zeros(96, 64)
        C.cpu_dequantize_nf4(packed, *constants, 64, out)
        return [out]

    yield "dequantize_nf4", dequantize
    for M in (1, 70, 300):
        x, grad_y = normal(M, 64), normal(M, 96)
        yield f"linear_nf4 M={M}", lambda x=x: [C.cpu_linear_nf4(x, packed, *constants, None, 64, 96)]
        yield f"grad_x M={M}", lambda g=grad_y: [C.cpu_linear_nf4_grad_x(g, packed, *constants, 64, 64)]
        lora = (lora_A, lora_B, seed, 2.0, 0.3)
        yield (
            f"linear_nf4_lora M={M}",
            lambda x=x, lora=lora: list(C.cpu_linear_nf4_lora(x, packed, *constants, None, *lora, 64, 96)),
        )
        s = normal(M, 4)
        yield (
            f"backward M={M}",
            lambda x=x, g=grad_y, s=s, lora=lora: list(
                C.cpu_linear_nf4_lora_backward(g, x, s, packed, *constants, *lora, 64, True, True, True)
            ),
        )

    def adamw() -> list[Any]:
        param, arena = torch.ones(5000), torch.zeros(40000, dtype=torch.uint8)
        segments = torch.tensor([[0, 0, 5000, 0, 20000, -1, -1, 0]])
        steps = torch.ones(1)
        C.cpu_adamw_step([param], [param + 1], steps, segments, arena, None, 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0)
        return [param, arena]

    yield "adamw_step", adamw


def run(threads: int, most: int) -> int:
    """Let the first, second, ... allocation of each call fail, each in a new thread with empty workspaces.

    Runs in the child process. Returns the number of injected failures.
    """
    import threading

    import torch

    from qlora_kernels.backends import cpu

    assert cpu.unavailable() is None
    torch.set_num_threads(threads)
    interposed = ctypes.CDLL(os.environ["LD_PRELOAD"])
    interposed.failed_allocations.restype = ctypes.c_long
    interposed.fail_allocation.argtypes = (ctypes.c_long,)

    def in_thread(function: Callable[[], Any]) -> Any:
        result: list[Any] = []

        def target() -> None:
            torch.set_num_threads(threads)
            try:
                result.append(function())
            except Exception as error:
                result.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
        return result[0]

    injected = 0
    for name, call in calls():
        expected = in_thread(call)
        if isinstance(expected, Exception):
            raise expected
        for library in WATCHED if injected == 0 else ():
            interposed.watch_library(library)
        for n in range(1, most + 1):
            before = interposed.failed_allocations()
            interposed.fail_allocation(n)
            outcome = in_thread(call)
            interposed.fail_allocation(0)
            if interposed.failed_allocations() == before:
                break
            injected += 1
            if not isinstance(outcome, (RuntimeError, MemoryError)):
                raise AssertionError(f"{name}: allocation {n} failed, and the call returned {outcome!r}")
            again = in_thread(call)
            if isinstance(again, Exception) or not all(map(torch.equal, again, expected)):
                raise AssertionError(f"{name}: wrong after allocation {n} failed: {again!r}")
    return injected


def main() -> int:
    """Build the library and run the child process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=int, default=200, help="allocations to fail of each call")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(f"failing allocator: {run(options.threads, options.most)} allocations failed, 0 lost\n")
        return 0
    command = [sys.executable, "-m", __spec__.parent, "--child", "--threads", str(options.threads)]
    environment = with_preloaded(build()) | {"PYTHONFAULTHANDLER": "1"}
    return subprocess.run([*command, "--most", str(options.most)], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
