"""Whether the compiled CUDA library can be loaded and run: its build record, torch's CUDA version, driver and GPU.

The library is linked to the dynamic CUDA runtime, libcudart.so.13, and uses the copy that a CUDA build of torch has
already loaded. It is not loaded under any other torch; its build record is read from the file.
"""

from __future__ import annotations

import mmap
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ...ops import native_library

LIBRARY = Path(__file__).with_name("_C.abi3.so")

OLDEST_DRIVER = {12: 525, 13: 580}
"""Major version of the CUDA runtime -> oldest Linux driver that runs it (CUDA release notes, minor-version
compatibility)."""


class Build(NamedTuple):
    """The build record of a compiled library.

    archs: QLORA_CUDA_ARCHS of the build, like "80;90a+PTX".   cuda: version of the toolkit, 13000 for 13.0.
    """

    archs: str
    cuda: int


def read_build(library: Path) -> Build:
    """Read the build record of a compiled library (csrc/bindings/cuda_platform.cpp) without loading it.

    Raises OSError for a file without a record.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        record = re.search(rb"qlora_kernels build: archs=([\w;+ ,]+) cuda=(\d+)\0", content)
        if record is None:
            raise OSError(f"{library} has no build record; rebuild it with `make ext`")
        return Build(record[1].decode(), int(record[2]))


@cache
def holds_sm90a() -> bool:
    """Whether the library holds code for sm_90a, for which linear_nf4_wgmma.cu is compiled where 90 or 90a is built."""
    return LIBRARY.exists() and bool(re.search(r"\b90a?\b", read_build(LIBRARY).archs))


def built_for() -> str:
    """Return the architectures and CUDA version of the library, which is not loaded, or that there is none."""
    if not LIBRARY.exists():
        return "nothing: the library is not built"
    build = read_build(LIBRARY)
    return f"{build.archs} by CUDA {version_text(build.cuda)}"


def library_facts() -> dict[str, str]:
    """Return what the library is built for. The library is not loaded."""
    return {"kernels built for": native_library.fact(built_for)}


def version_text(version: int) -> str:
    """Format a version number of the runtime or driver: 13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def torch_mismatch(build: Build, torch_cuda: str | None) -> str | None:
    """Return why a torch built with CUDA `torch_cuda`, or without CUDA (None), cannot load the library; None if it can.

    Within one major version, the runtime keeps its binary interface and its file name.
    """
    major = build.cuda // 1000
    kernels = f"the kernels are built for {build.archs} by CUDA {version_text(build.cuda)}"
    if torch_cuda is None:
        return f"this torch is built without CUDA ({kernels})"
    if int(torch_cuda.partition(".")[0]) == major:
        return None
    return (
        f"this torch is built with CUDA {torch_cuda} and has no libcudart.so.{major} ({kernels}); install a torch "
        f"built with CUDA {major}, for example from https://download.pytorch.org/whl/cu{major}0"
    )


def driver_too_old(driver: int, runtime: int) -> str | None:
    """Return why a driver for CUDA `driver` cannot run the runtime, with the fix; None if it can or is missing.

    A driver runs every runtime of its own and of earlier major versions.
    """
    major = runtime // 1000
    if driver == 0 or driver // 1000 >= major:
        return None
    needed = f"driver {OLDEST_DRIVER[major]}" if major in OLDEST_DRIVER else "a newer driver"
    return (
        f"the NVIDIA driver supports CUDA {version_text(driver)} and torch's runtime is CUDA {version_text(runtime)}, "
        f"which needs {needed} or later; update the driver, or install a torch built with CUDA {driver // 1000}"
    )


def arch_mismatch(build: Build, capability: tuple[int, int], driver: int) -> str | None:
    """Return why the library cannot run on a GPU of `capability` under `driver`, with the fix; None if it can.

    Binaries run on their own architecture and on later ones of the same major version; for binaries marked 'a' or 'f',
    only their own architecture is accepted. PTX runs on all later architectures if the driver is as new as its
    compiler.
    """
    major, minor = capability
    fix = f"install a wheel for sm_{major}{minor}, or rebuild with QLORA_CUDA_ARCHS={major}{minor}"
    has_ptx = False
    for name, ptx in re.findall(r"(\d{2,3}[af]?)(\+PTX)?", build.archs):
        arch = int(name.rstrip("af"))
        same_major, later = arch // 10 == major, arch <= major * 10 + minor
        if arch == major * 10 + minor or (later and same_major and name.isdigit()):
            return None
        has_ptx |= bool(ptx) and later and name.isdigit()
    if has_ptx and driver >= build.cuda:
        return None
    if has_ptx:
        return (
            f"its kernels for sm_{major}{minor} are PTX of CUDA {version_text(build.cuda)}, which the driver, for CUDA "
            f"{version_text(driver)}, cannot compile; update the driver, {fix}"
        )
    return f"its kernels are built for {build.archs} and this GPU is sm_{major}{minor}; {fix}"


@cache
def load() -> None:
    """Load the library. Raises OSError if this fails, which is a broken installation."""
    native_library.load(LIBRARY)


def has_current_stream() -> bool:
    """Whether torch exports the function for the current stream. The library must be loaded."""
    return bool(torch.ops.qlora_kernels_C.cuda_has_current_stream())


def driver_version() -> int:
    """Return the CUDA version that the driver supports, 0 without a driver. The library must be loaded."""
    return int(torch.ops.qlora_kernels_C.cuda_driver_version())


def runtime_version() -> int:
    """Return the version of the CUDA runtime that the library uses. The library must be loaded."""
    return int(torch.ops.qlora_kernels_C.cuda_runtime_version())


@cache
def unavailable() -> str | None:
    """Return why this backend cannot run here, with the fix, or None if it can."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built; put CUDA's nvcc on PATH and run `make ext`"
    build = read_build(LIBRARY)
    if reason := torch_mismatch(build, torch.version.cuda):
        return reason
    load()
    if not has_current_stream():
        return (
            "torch's libtorch_cuda.so does not export aoti_torch_get_current_cuda_stream; install torch 2.10 or later"
        )
    if reason := driver_too_old(driver_version(), runtime_version()):
        return reason
    if not torch.cuda.is_available():
        return f"no CUDA device (the kernels are built for {build.archs} by CUDA {version_text(build.cuda)})"
    return arch_mismatch(build, torch.cuda.get_device_capability(), driver_version())
