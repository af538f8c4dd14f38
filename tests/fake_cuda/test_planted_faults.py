"""Faults planted in the bindings of the CUDA library are detected by the calls of calls.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .planted import LOOKUP

SCHEDULES = ("eager",)
LIBRARY_VARIABLE = "FAKE_CUDA_PLANTED"
"""The library with the faults, which tests/support/fake_cuda/__main__.py compiles (planted.py)."""

NOT_OBSERVABLE = {
    # These calls are told the device, or allocate memory that all devices use alike. Without a guard they would only
    # create a context on the current device.
    "guard cuda_managed_memory.cpp:allocate_page_locked",
    "guard cuda_managed_memory.cpp:prefer_device",
    "guard cuda_managed_memory.cpp:prefetch",
    # A prefetch moves pages and changes no value.
    "stream cuda_managed_memory.cpp:prefetch",
    # The calls run at capability 8.0, and the kernel needs 9.0: test_gpu_check.py runs it, in a library for sm_90a.
    "guard cuda_linear_nf4.cpp:linear_nf4_wgmma",
    "stream cuda_linear_nf4.cpp:linear_nf4_wgmma",
}


@pytest.mark.skipif(
    LIBRARY_VARIABLE not in os.environ, reason="needs the library with faults, which make test-cuda-torch compiles"
)
def test_faults_are_detected() -> None:
    command = [sys.executable, "-m", "tests.fake_cuda.detect_faults", os.environ[LIBRARY_VARIABLE]]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("") == "", "a call fails without a fault"
    assert "does not export aoti_torch_get_current_cuda_stream" in found[LOOKUP]
    assert {fault for fault, error in found.items() if not error} == NOT_OBSERVABLE
