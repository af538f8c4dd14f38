"""csrc/bindings/cuda_platform.cpp: how the library finds torch's current stream."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kernels.backends import cuda

pytestmark = pytest.mark.skipif(
    not cuda.LIBRARY.exists(), reason=f"{cuda.LIBRARY.name} is not built: put nvcc on PATH and run `make ext`"
)

EXPORTS_THE_FUNCTION = "int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }"
PROGRAM = """
import ctypes, sys, torch
for path in sys.argv[2:]:
    ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
torch.ops.load_library(sys.argv[1])
print(torch.ops.qlora_kernels_C.cuda_has_current_stream())
"""


def finds_stream(*loaded_first: Path) -> bool:
    """Whether the library finds torch's function in a new process that has loaded `loaded_first` as torch does."""
    command = [sys.executable, "-c", PROGRAM, str(cuda.LIBRARY), *map(str, loaded_first)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles a stand-in for libtorch_cuda.so: needs gcc on PATH")
@pytest.mark.parametrize("source", [EXPORTS_THE_FUNCTION, ""], ids=["exported", "not exported"])
def test_stream_function_of_a_torch_with_cuda(tmp_path: Path, source: str) -> None:
    """A CUDA build of torch loads libtorch_cuda.so with RTLD_LOCAL: its symbols are in no global scope."""
    library = tmp_path / "libtorch_cuda.so"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    assert finds_stream(library) == bool(source)


def test_stream_function_of_a_torch_without_cuda() -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    assert not finds_stream()
