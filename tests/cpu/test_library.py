"""The dependencies of the CPU library, and the instructions it may contain."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from qlora_kernels.backends import cpu

if (reason := cpu.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

STABLE = re.compile(r"^(aoti_torch_\w+|torch_\w+)$")
"""The C functions of torch's stable ABI."""


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_only_stable_torch_symbols():
    undefined = [
        line.split()[-1].split("@")[0]
        for line in output_of("nm", "-D", "--undefined-only", str(cpu.LIBRARY)).splitlines()
    ]
    of_torch = [name for name in undefined if "torch" in name or "c10" in name or "at::" in name]
    assert of_torch, "the library uses torch through its C functions"
    assert [name for name in of_torch if not STABLE.match(name)] == []
    assert [name for name in undefined if name.startswith("Py") or name.startswith("_Py")] == []


def test_no_second_thread_pool():
    needed = output_of("readelf", "-d", str(cpu.LIBRARY))
    for runtime in ("gomp", "iomp", "libomp", "tbb"):
        assert runtime not in needed
    undefined = output_of("nm", "-D", "--undefined-only", str(cpu.LIBRARY))
    assert "GOMP_" not in undefined
    assert "__kmpc" not in undefined
    assert "pthread_create" not in undefined


def test_wide_instructions_only_in_their_namespace():
    """Only functions in the AVX-512 and AMX namespaces use zmm registers, and only these and AVX2's use ymm
    registers."""
    current, wide, middle, leaks = "", False, False, set()
    for line in output_of("objdump", "-d", "-C", "--no-show-raw-insn", str(cpu.LIBRARY)).splitlines():
        if line.endswith(">:"):
            current = line
            wide = re.search("avx512|amx_bf16", current) is not None
            middle = wide or "avx2" in current
        elif ("%zmm" in line and not wide) or ("%ymm" in line and not middle):
            leaks.add(current)
    assert leaks == set()
