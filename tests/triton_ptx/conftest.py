"""These tests need the emulator's compiler, and compiled instead of interpreted kernels."""

from __future__ import annotations

import os

import pytest

from tests.support import cuda_host


@pytest.fixture(autouse=True)
def compiled_kernels_on_the_host():
    missing = cuda_host.missing_tools()
    if missing:
        pytest.skip(f"no emulator: {missing}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 interprets kernels instead of compiling them")
