"""A thousand calls of the native ops with unsound arguments; `make fuzz` runs a hundred thousand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qlora_kernels.backends import cpu


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_no_call_ends_the_process_or_writes_outside_its_arguments(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.native_ops", "--calls", "1000", "--report", str(tmp_path / "call")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 calls tried, 0 lost" in done.stdout
