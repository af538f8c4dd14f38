"""The compilers the emulator needs, or why it cannot have them: g++ for everything, nvcc for PTX, CUDA's headers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]
CACHE = ROOT / "build" / "cuda_host"


@cache
def cuda_home() -> Path | None:
    """The toolkit: nvcc on PATH, else the nvidia-cuda-nvcc package of this environment, else CUDA_HOME."""
    on_path = shutil.which("nvcc")
    if on_path:
        # The command may be a wrapper script elsewhere than the toolkit, so nvcc itself is asked where its headers are.
        report = subprocess.run([on_path, "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        for line in report.stderr.splitlines():
            name, _, value = line.removeprefix("#$ ").partition("=")
            if name == "TOP":
                return Path(value.strip()).resolve()
    package = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
    if (package / "bin" / "nvcc").exists():
        return package
    stated = os.environ.get("CUDA_HOME")
    return Path(stated) if stated and (Path(stated) / "include" / "cuda_runtime.h").exists() else None


def cuda_include() -> Path:
    """Folder of cuda_runtime.h."""
    home = cuda_home()
    if home is None:
        raise FileNotFoundError(missing_tools())
    return home / "include"


def nvcc() -> Path:
    """The compiler itself."""
    home = cuda_home()
    if home is None:
        raise FileNotFoundError(nvcc_missing())
    return home / "bin" / "nvcc"


def missing_tools() -> str | None:
    """Why .cu sources cannot be compiled for the CPU here, with the fix; None where they can."""
    if platform.machine() != "x86_64":
        return f"the CUDA emulator switches x86-64 stacks, this machine is {platform.machine()}"
    if shutil.which("g++") is None:
        return "the CUDA emulator needs g++ (12 or later) on PATH"
    home = cuda_home()
    if home is None or not (home / "include" / "cuda_bf16.h").exists():
        return "the CUDA emulator needs CUDA's headers: put nvcc 13 on PATH, or run `make setup`"
    return None


def nvcc_missing() -> str | None:
    """Why PTX cannot be made here, with the fix; None where it can."""
    home = cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        return "compiling CUDA needs nvcc: put nvcc 13 on PATH, or run `make setup`"
    return missing_tools()


@cache
def sanitizer_library(name: str) -> str:
    """Path of g++'s lib<name>.so, to be preloaded into the worker."""
    command = ["g++", f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@cache
def versions() -> str:
    """What the cache's keys must change with."""
    commands = [["g++", "--version"]] + ([[str(nvcc()), "--version"]] if nvcc_missing() is None else [])
    return "\n".join(subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
