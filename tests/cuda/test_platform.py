"""Conditions for loading and running the compiled library: stream function, CUDA versions, driver, GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends import cuda
from qlora_kernels.backends.cuda import availability
from qlora_kernels.backends.cuda.availability import Build, arch_mismatch, driver_too_old, read_build, torch_mismatch
from qlora_kernels.ops import registry

from .launching import needs_library, runtime_to_preload

EXPORTS_THE_FUNCTION = "int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }"
PROGRAM = """
import ctypes, sys, torch
for path in sys.argv[2:]:
    ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
torch.ops.load_library(sys.argv[1])
print(torch.ops.qlora_kernels_C.cuda_has_current_stream())
"""


def finds_stream(*loaded_first: Path) -> bool:
    """Whether the library finds torch's function in a new process that loaded `loaded_first` in torch's way."""
    command = [sys.executable, "-c", PROGRAM, str(cuda.LIBRARY), *runtime_to_preload(), *map(str, loaded_first)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a libtorch_cuda.so of its own")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles a stand-in for libtorch_cuda.so: needs gcc on PATH")
@pytest.mark.parametrize("source", [EXPORTS_THE_FUNCTION, ""], ids=["exported", "not exported"])
def test_stream_function_of_a_simulated_torch_with_cuda(tmp_path: Path, source: str) -> None:
    """A CUDA build of torch loads libtorch_cuda.so with RTLD_LOCAL, so that its symbols are not in the global scope."""
    library = tmp_path / "libtorch_cuda.so"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    assert finds_stream(library) == bool(source)


@needs_library
def test_stream_function_of_this_torch() -> None:
    assert finds_stream() == (torch.version.cuda is not None)


@needs_library
def test_build_record_is_read_without_loading(tmp_path: Path) -> None:
    """`qlora-kernels info` reads the file; the library is not loaded under a torch without CUDA."""
    build = read_build(cuda.LIBRARY)
    assert build.archs
    assert 13000 <= build.cuda < 14000
    script = """
from qlora_kernels.cli import main
main(["info", "--json"])
import torch
assert torch.version.cuda or "backends/cuda/_C" not in open("/proc/self/maps").read()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["gpu"]["kernels built for"] == f"{build.archs} by CUDA {availability.version_text(build.cuda)}"
    if torch.version.cuda is None:
        assert f"without CUDA (the kernels are built for {build.archs}" in facts["backends"]["cuda"]
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF")
    with pytest.raises(OSError, match=r"other\.so has no build record; rebuild it with `make ext`"):
        read_build(other)


@pytest.mark.parametrize(
    ("torch_cuda", "says"),
    [
        ("13.0", None),
        ("13.2", None),
        (None, "this torch is built without CUDA (the kernels are built for 80;90a by CUDA 13.0)"),
        ("12.6", "this torch is built with CUDA 12.6 and has no libcudart.so.13"),
        ("12.8", "install a torch built with CUDA 13, for example from https://download.pytorch.org/whl/cu130"),
        ("14.0", "this torch is built with CUDA 14.0 and has no libcudart.so.13"),
    ],
)
def test_torch_version_mismatch(torch_cuda: str | None, says: str | None) -> None:
    reason = torch_mismatch(Build("80;90a", 13000), torch_cuda)
    assert reason is None if says is None else says in str(reason)


@pytest.mark.parametrize(
    ("driver", "runtime", "says"),
    [
        (13000, 13000, None),
        (13000, 13020, None),  # minor-version compatibility
        (14000, 13000, None),
        (0, 13000, None),  # no driver: reported as a missing device
        (12080, 13000, "the NVIDIA driver supports CUDA 12.8 and torch's runtime is CUDA 13.0, which needs driver 580"),
        (12080, 13000, "update the driver, or install a torch built with CUDA 12"),
        (13020, 14000, "needs a newer driver or later"),
    ],
)
def test_driver_version_mismatch(driver: int, runtime: int, says: str | None) -> None:
    reason = driver_too_old(driver, runtime)
    assert reason is None if says is None else says in str(reason)


@pytest.mark.parametrize(
    ("archs", "capability", "works"),
    [
        ("80", (8, 0), True),
        ("80", (8, 6), True),
        ("86", (8, 0), False),
        ("80;90a", (9, 0), True),
        ("80", (9, 0), False),
        ("80+PTX", (12, 0), True),
        ("90a", (10, 0), False),
        ("90+PTX", (8, 0), False),
    ],
)
def test_architecture_mismatch(archs: str, capability: tuple[int, int], works: bool) -> None:
    reason = arch_mismatch(Build(archs, 13000), capability, 13000)
    if works:
        assert reason is None
    else:
        assert reason is not None
        assert archs in reason
        assert f"QLORA_CUDA_ARCHS={capability[0]}{capability[1]}" in reason


def test_ptx_needs_driver_of_compiler_version() -> None:
    """A CUDA 13.0 driver runs binaries of 13.2 but does not compile PTX of 13.2."""
    build = Build("80+PTX", 13020)
    assert arch_mismatch(build, (8, 6), 13000) is None
    reason = arch_mismatch(build, (9, 0), 13000)
    assert reason is not None
    assert "are PTX of CUDA 13.2, which the driver, for CUDA 13.0, cannot compile" in reason
    assert arch_mismatch(build, (9, 0), 13020) is None


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Simulate torch for CUDA 13.0, driver 13.0, an H100, and a library for sm_80."""
    monkeypatch.setattr(availability, "LIBRARY", Path(__file__))
    monkeypatch.setattr(availability, "read_build", lambda path: Build("80", 13000))
    monkeypatch.setattr(availability, "load", lambda: None)
    monkeypatch.setattr(availability, "driver_version", lambda: 13000)
    monkeypatch.setattr(availability, "runtime_version", lambda: 13000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(availability, "has_current_stream", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    caches = (availability.unavailable, registry.unavailable, registry._select)
    for caching in caches:
        caching.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for caching in caches:
        caching.cache_clear()


def test_gpu_without_compiled_architecture(simulated: pytest.MonkeyPatch) -> None:
    """For an H100 and a library built for sm_80, the backend and a forced call report the reason."""
    reason = "built for 80 and this GPU is sm_90; install a wheel for sm_90, or rebuild with QLORA_CUDA_ARCHS=90"
    assert reason in qk.backends()["cuda"]
    with qk.use_backend("cuda"), pytest.raises(NotImplementedError, match=reason):
        qk.quantize_nf4(torch.zeros(64))


def test_driver_older_than_runtime(simulated: pytest.MonkeyPatch) -> None:
    """Triton is used instead, so that ops do not fail with cudaErrorInsufficientDriver."""
    simulated.setattr(availability, "driver_version", lambda: 12080)
    assert "the NVIDIA driver supports CUDA 12.8" in qk.backends()["cuda"]
    triton = registry.importlib.import_module("qlora_kernels.backends.triton")
    simulated.setattr(triton, "unavailable", lambda: None)
    registry.unavailable.cache_clear()
    assert registry.select(registry.Problem("linear_nf4", "cuda", torch.bfloat16)).backend == "triton"


def test_library_not_loaded_under_other_cuda_version(simulated: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise AssertionError("the library must not be loaded")

    simulated.setattr(availability, "load", load)
    simulated.setattr(torch.version, "cuda", "12.6")
    assert "this torch is built with CUDA 12.6" in qk.backends()["cuda"]


def test_torch_without_stream_function(simulated: pytest.MonkeyPatch) -> None:
    simulated.setattr(availability, "has_current_stream", lambda: False)
    assert "does not export aoti_torch_get_current_cuda_stream" in qk.backends()["cuda"]


def test_no_device(simulated: pytest.MonkeyPatch) -> None:
    simulated.setattr(torch.cuda, "is_available", lambda: False)
    assert qk.backends()["cuda"] == "no CUDA device (the kernels are built for 80 by CUDA 13.0)"
