"""Faults planted in the CPU kernels turn tests of the suite red."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kernels.backends import cpu
from tests.support.planted_source import with_fault

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None or cpu.unavailable() is not None, reason="needs the CPU library and a compiler")
def test_faults_are_detected():
    command = [sys.executable, "-m", "tests.cpu.planted"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_right_and_wrong_text_are_chosen_at_run_time():
    assert with_fault("y = a + b;", "f.h", "a + b", "a", 3) == "y = (planted_fault == 3 ? (a) : (a + b));"
    assert with_fault("f();", "f.h", "f();", ";", 3) == "if (planted_fault == 3) { ; } else { f(); }"


@pytest.mark.parametrize(("source", "count"), [("y = b;", 0), ("y = a + a;", 2)])
def test_text_that_does_not_occur_once_is_an_error(source, count):
    message = rf"f\.h must contain 'a' once, got {count}: bring the planted fault up to date"
    with pytest.raises(AssertionError, match=message):
        with_fault(source, "f.h", "a", "b", 1)
