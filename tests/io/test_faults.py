"""A short form of `make faults`: saves that are killed, interrupted or run out of space neither lose nor mix data."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.io.fault_injection import Fault
from tests.io.faults import SAVES, inject, inject_full_disk

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")


@pytest.mark.parametrize("save", SAVES, ids=lambda save: save.name)
def test_killed_at_file_operations(save):
    """The step has no common factor with the period of the operations; `make faults` tests every operation."""
    assert inject(save, Fault.KILL, step=5) > 2


@pytest.mark.parametrize("fault", [Fault.INTERRUPT, Fault.ERROR, Fault.FULL], ids=lambda fault: fault.value)
def test_interrupts_and_errors_at_file_operations(fault):
    assert inject(SAVES[0], fault, step=11) > 2


def test_writes_that_fail():
    assert inject_full_disk(SAVES[0], iter(range(0, 4096, 400))) > 1
    assert inject_full_disk(SAVES[1], iter(range(0, 4096, 400))) > 1


@pytest.mark.skipif(sys.platform != "linux", reason="the system calls are replaced by LD_PRELOAD")
def test_system_calls_that_fail():
    command = [sys.executable, "-m", "tests.io.failing_files", "--step", "23"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    injected = re.search(r"(\d+) system calls hit, lost: 0", done.stdout)
    assert injected is not None
    assert int(injected[1]) > 40
