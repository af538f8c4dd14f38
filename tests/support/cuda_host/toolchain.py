"""Locates the compilers that the emulator needs: g++ for everything, nvcc for PTX, CUDA's headers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from python.build_support.cuda_toolkit import cuda_home

ROOT = Path(__file__).parents[3]
CACHE = ROOT / "build" / "cuda_host"


def cuda_includes() -> tuple[Path, Path]:
    """Return the folders of cuda_runtime.h and of its headers from CCCL."""
    home = cuda_home()
    if home is None:
        raise FileNotFoundError(missing_tools())
    return home / "include", home / "include" / "cccl"


def nvcc() -> Path:
    """Return the path of nvcc."""
    home = cuda_home()
    if home is None:
        raise FileNotFoundError(nvcc_missing())
    return home / "bin" / "nvcc"


def missing_tools() -> str | None:
    """Return why .cu sources cannot be compiled for the CPU here, with the fix, or None if they can."""
    if platform.machine() != "x86_64":
        return f"the CUDA emulator switches x86-64 stacks, this machine is {platform.machine()}"
    if shutil.which("g++") is None:
        return "the CUDA emulator needs g++ (12 or later) on PATH"
    home = cuda_home()
    if home is None or not (home / "include" / "cuda_bf16.h").exists():
        return "the CUDA emulator needs CUDA's headers: put nvcc 13 on PATH, or run `make setup`"
    return None


def nvcc_missing() -> str | None:
    """Return why PTX cannot be made here, with the fix, or None if it can."""
    home = cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        return "compiling CUDA needs nvcc: put nvcc 13 on PATH, or run `make setup`"
    return missing_tools()


@cache
def sanitizer_library(name: str) -> str:
    """Return the path of g++'s lib<name>.so, for preloading into the worker."""
    command = ["g++", f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@cache
def fixed_addresses() -> tuple[str, ...]:
    """Return the command that runs a program of ThreadSanitizer without address randomization; empty if it cannot.

    Random addresses may lie in the sanitizer's shadow memory, which it reports as an "unexpected memory mapping". Some
    containers do not permit the command.
    """
    command = ("setarch", "-R")
    if shutil.which("setarch") is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        return ()
    return command


@cache
def versions() -> str:
    """Return the versions that are part of the cache's keys."""
    commands = [["g++", "--version"]] + ([[str(nvcc()), "--version"]] if nvcc_missing() is None else [])
    return "\n".join(subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
