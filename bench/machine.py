"""The provenance of every row: machine, instruction set, commit and versions."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .limits import suffix

ROOT = Path(__file__).parents[1]

PACKAGES = ("torch", "bitsandbytes", "llama_cpp_python", "peft", "torchao", "transformers", "triton")


def provenance(device: str) -> dict[str, Any]:
    """Return the provenance fields of every row."""
    return {
        "device": device,
        "machine": _gpu() if device == "cuda" else _cpu() + suffix(),
        "isa": cpu_isa() if device == "cpu" else f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}",
        "commit": commit(),
        "versions": versions(),
    }


def cache_bytes(device: str) -> int:
    """Return the size of the last-level cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [
        int(path.read_text().strip().removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 << 20)


def cpu_isa() -> str:
    """Return the instruction set of the cpu backend here, or `none` if it is not built."""
    backend = importlib.import_module("qlora_kernels.backends.cpu")
    return "none" if backend.unavailable() else str(backend.instruction_set())


@cache
def commit() -> str:
    """Return the checkout's commit, with `+` for modified tracked files and `stale` if the library is older."""
    short = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "qlora_kernels", "csrc", "bench/*.py")
    return short + ("+" if changed else "") + (" stale" if _library_is_stale() else "")


def _library_is_stale() -> bool:
    """Whether a source of the native CPU library has changed since it was built."""
    library = ROOT / "qlora_kernels" / "backends" / "cpu" / "_C.abi3.so"
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    return library.exists() and any(path.stat().st_mtime > library.stat().st_mtime for path in sources)


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are measured."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    family = re.search(r"cpu family\s*:\s*(\d+)\nmodel\s*:\s*(\d+)", text)
    name = model.group(1) if model else platform.processor() or platform.machine()
    detail = f" family {family.group(1)} model {family.group(2)}" if family else ""
    return f"{name}{detail}, {os.cpu_count()} cores, L3 {cache_bytes('cpu') >> 20} MiB"


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.multi_processor_count} SMs, L2 {properties.L2_cache_size >> 20} MiB"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
