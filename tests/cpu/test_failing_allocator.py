"""A failed allocation inside the native library raises, and later calls are right."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from qlora_kernels.backends import cpu


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is replaced by LD_PRELOAD")
@pytest.mark.parametrize("threads", [1, 2])
def test_failed_allocations_raise_and_recover(threads):
    command = [sys.executable, "-m", "tests.cpu.failing_allocator", "--threads", str(threads), "--most", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    injected = re.search(r"(\d+) allocations failed, 0 lost", done.stdout)
    assert injected is not None
    assert int(injected[1]) > 50
