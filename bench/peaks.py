"""The peak rates of this machine, measured in the same run as the benchmarks; fractions are relative to them.

    read      GB/s     all threads read a buffer far beyond the last-level cache
    copy      GB/s     bytes read plus bytes written while one such buffer is copied to another
        bf16      GFLOP/s  bf16 products with fp32 sums, by the fastest unit: AMX tiles, vdpbf16ps or fp32 FMA
    fma       GFLOP/s  fp32 multiply-adds, operands in registers

On an x86 CPU with a C++ compiler they are measured by probes.cpp, and `how` names the unit. Elsewhere torch's functions
replace the probes. These may be below the peak and make fractions too large; the row shows which were used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .machine import ROOT, cache_bytes
from .timing import clock_of

SOURCE = Path(__file__).with_name("probes.cpp")
CSRC = ROOT / "csrc"
AMX_SOURCES = tuple(CSRC / "cpu" / name for name in ("amx/support.cpp", "processor.cpp"))
AMX_HEADERS = tuple(CSRC / "cpu" / name for name in ("amx/support.h", "amx/tile.h", "processor.h"))


NAMES = ("read", "copy", "bf16", "fma")
"""The peaks that every device has."""

STAND_IN_S = 1.0
"""Seconds for which a stand-in is repeated; the best run counts, because other processes can only slow runs down."""

NARROW = ("avx2", "portable")
"""Instruction sets without 512-bit registers."""


@dataclass(frozen=True)
class Peak:
    """A rate in bytes or flops per second.   how: the probed unit, or the torch function that replaces the probe."""

    name: str
    rate: float
    how: str


def measure_peaks(device: str, isa: str | None = None) -> dict[str, Peak]:
    """Return all peaks by name.   isa: the instruction set that arithmetic is limited to."""
    peaks = {peak.name: peak for peak in _probed(isa)} if device == "cpu" else {}
    if missing := [name for name in NAMES if name not in peaks]:
        peaks |= {peak.name: peak for peak in _stand_ins(device) if peak.name in missing}
    return peaks


def _probed(isa: str | None) -> Iterator[Peak]:
    library = _library()
    if library is None:
        return
    threads, size = torch.get_num_threads(), ctypes.c_size_t(_working_set("cpu"))
    fma = Peak("fma", library.probe_fma(threads, int(isa not in NARROW)), "FMA")
    units = [Peak("bf16", fma.rate, "FMA")]
    if isa in (None, "amx_bf16"):
        units.append(Peak("bf16", library.probe_amx(threads), "AMX"))
    if isa in (None, "amx_bf16", "avx512_bf16"):
        units.append(Peak("bf16", library.probe_bf16_dot(threads), "vdpbf16ps"))
    peaks = [
        Peak("read", library.probe_read(threads, size), "probe"),
        Peak("copy", library.probe_copy(threads, size), "probe"),
        max(units, key=lambda peak: peak.rate),
        fma,
    ]
    yield from (peak for peak in peaks if peak.rate)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return probes.cpp, compiled once per version, or None if it cannot be compiled."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if platform.machine() != "x86_64" or compiler is None:
        return None
    content = b"".join(path.read_bytes() for path in (SOURCE, *AMX_SOURCES, *AMX_HEADERS))
    path = ROOT / "build" / f"probes-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", "-DQLORA_ISA=probes"]
        command += [f"-I{CSRC / 'cpu'}", f"-I{CSRC / 'include'}"]
        command += [*map(str, (SOURCE, *AMX_SOURCES)), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.rename(path)
    library = ctypes.CDLL(str(path))
    for name in ("read", "copy", "bf16_dot", "amx", "fma"):
        getattr(library, f"probe_{name}").restype = ctypes.c_double
    return library


def _working_set(device: str) -> int:
    return max(8 * cache_bytes(device), 256 << 20)


def _stand_ins(device: str) -> Iterator[Peak]:
    source = torch.ones(_working_set(device) // 4, device=device)
    target = torch.ones_like(source)
    yield Peak("read", source.nbytes / _best(device, source.sum), "torch.sum")
    yield Peak("copy", 2 * source.nbytes / _best(device, lambda: target.copy_(source)), "torch.copy_")
    for name, dtype in (("bf16", torch.bfloat16), ("fma", torch.float32)):
        size = 8192 if device == "cuda" else 2048
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        yield Peak(name, 2 * size**3 / _best(device, partial(torch.matmul, a, b)), "torch.matmul")


def _best(device: str, call: Callable[[], object]) -> float:
    clock, until = clock_of(device), time.perf_counter() + STAND_IN_S
    times: list[float] = []
    while len(times) < 5 or time.perf_counter() < until:
        times.append(clock(call))
    return min(times)
