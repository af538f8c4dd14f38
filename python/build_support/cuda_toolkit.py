"""Locates CUDA's compiler and headers, on PATH or in the nvidia-cuda-* packages that `make setup` installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path


@cache
def cuda_home() -> Path | None:
    """Return the toolkit of nvcc on PATH, of this environment's nvidia-cuda-nvcc package, or of CUDA_HOME; else
    None.
    """
    on_path = shutil.which("nvcc")
    if on_path:
        # The command may be a wrapper script outside the toolkit, so nvcc's own report gives the location.
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


def shared_runtime(home: Path) -> Path | None:
    """Return libcudart.so.13; toolkits keep it in lib64 and packages in lib."""
    places = (home / folder for folder in ("lib64", "lib"))
    found = (path for place in places for path in sorted(place.glob("libcudart.so.*")) if path.suffix[1:].isdigit())
    return next(found, None)


def version(home: Path) -> str:
    """Return nvcc's release, such as 13.0."""
    report = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return report.split("release ", 1)[1].split(",", 1)[0]
