"""The registry's user interface: qk.backends(), use_backend, and the messages of refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import qlora_kernels as qk
from tests.support.problems import gaussian


def test_backends_remains_a_function_after_loading():
    qk.quantize_nf4(gaussian(64))
    report = qk.backends()
    assert set(report) == {"reference", "cpu", "triton", "cuda"}
    assert report["reference"].startswith("available: ")


def test_forced_unavailable_backend_raises_with_reason():
    unusable = [name for name, state in qk.backends().items() if not state.startswith("available")]
    if not unusable:
        pytest.skip("every backend runs here")
    with qk.use_backend(unusable[0]), pytest.raises(NotImplementedError, match=f"backend '{unusable[0]}' cannot serve"):
        qk.quantize_nf4(gaussian(64))


def test_use_backend_is_reset_after_error():
    with pytest.raises(TypeError), qk.use_backend("reference"):
        qk.quantize_nf4(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"use_backend: name must be one of"), qk.use_backend("tpu"):
        pass


def test_library_that_does_not_load_is_reported_and_not_replaced(tmp_path):
    """`info` and backends() say why and what to do; an op raises, because another backend would be slow in silence."""
    damaged = tmp_path / "_C.abi3.so"
    damaged.write_bytes(b"\x7fELF and no more")
    script = f"""
import json, pathlib, torch
from qlora_kernels.backends import cpu
from qlora_kernels.backends.cuda import availability
from qlora_kernels.cli import main
import qlora_kernels as qk
cpu.LIBRARY = availability.LIBRARY = pathlib.Path({str(damaged)!r})
assert main(["info", "--json"]) == 0
try:
    qk.quantize_nf4(torch.zeros(64))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed, error = done.stdout.splitlines()
    facts = json.loads(printed)
    assert error.startswith(f"{damaged} must load under torch {torch.__version__}, got: ")
    assert "file too short" in error
    assert error.endswith("rebuild it with `make ext`, or install the package again")
    assert facts["backends"]["cpu"] == facts["cpu"]["kernels use"] == facts["cpu"]["amx"] == error
    assert "has no build record; rebuild it" in facts["gpu"]["kernels built for"]
