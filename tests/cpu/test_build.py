"""The build of the CPU library for other CPUs. `make test-aarch64` runs the result."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time

import pytest

from python.build_support import cpu
from python.build_support.native import CSRC, compile_step, replace, tool

CROSS_COMPILER = "aarch64-linux-gnu-g++"


@pytest.fixture
def compiler(tmp_path):
    """Return a function that makes a compiler with the given target."""

    def make(target: str) -> str:
        path = tmp_path / target
        path.write_text(f"#!/bin/sh\necho {target}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


@pytest.mark.parametrize(
    ("target", "sets"),
    [
        ("x86_64-linux-gnu", ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "amx_bf16_emulated"]),
        ("x86_64-conda-linux-gnu", ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "amx_bf16_emulated"]),
        ("aarch64-linux-gnu", ["portable", "neon"]),
        ("arm64-apple-darwin23.6.0", ["portable", "neon"]),
        ("powerpc64le-linux-gnu", ["portable"]),
    ],
)
def test_instruction_sets_follow_compiler_target(compiler, tmp_path, target, sets):
    """The instruction sets are those of the compiler's target and do not depend on its host."""
    steps = cpu.kernel_commands(compiler(target), tmp_path, cpu.COMMON_FLAGS)
    built = {step.output.parent.name for step in steps}
    assert built == {"common", *sets}
    assert {"isa", "support", "workspace"} <= {
        step.output.stem for step in steps if step.output.parent.name == "common"
    }
    others = {"QLORA_X86_KERNELS", "QLORA_ARM_KERNELS", "-mavx2"}
    expected = {"x": {"QLORA_X86_KERNELS", "-mavx2"}, "a": {"QLORA_ARM_KERNELS"}, "p": set()}[target[0]]
    commands = " ".join(argument for step in steps for argument in step.command)
    assert {flag for flag in others if flag in commands} == expected


@pytest.mark.skipif(shutil.which(CROSS_COMPILER) is None, reason=f"{CROSS_COMPILER} is not installed")
def test_neon_decode_uses_table_lookups(tmp_path):
    """The decode of the neon set is a tbl instruction, and nothing of x86 is compiled."""
    command = (CROSS_COMPILER, *cpu.COMMON_FLAGS, *cpu.ARM_FLAGS["neon"], "-DQLORA_ISA=neon", f"-I{CSRC / 'include'}")
    source = CSRC / "cpu" / "dequantize_nf4.cpp"
    assembly = subprocess.run(
        [*command, "-S", str(source), "-o", "-"], capture_output=True, text=True, check=True
    ).stdout
    assert "tbl\t" in assembly


@pytest.mark.parametrize("platform", ["win32", "cygwin"])
def test_other_systems_are_refused(monkeypatch, tmp_path, platform):
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(cpu.CannotBuild, match="built on Linux and macOS, not on " + platform):
        cpu.CpuLibrary().compile_steps(tmp_path)


def test_edited_header_recompiles_its_includers(tmp_path):
    """The compiler's dependency file lists the headers of each object; other objects are not recompiled."""
    header, source, other = tmp_path / "a header.h", tmp_path / "source.cpp", tmp_path / "other.cpp"
    header.write_text("int value();\n")
    source.write_text('#include "a header.h"\n')
    other.write_text("int other() { return 1; }\n")
    command = (tool("CXX", "c++", "g++", "clang++"), "-std=c++20")
    steps = [compile_step(command, path, tmp_path / f"{path.stem}.o") for path in (source, other)]
    assert [step.is_current() for step in steps] == [False, False]
    for step in steps:
        step.run()
    assert [step.is_current() for step in steps] == [True, True]
    later = time.time() + 10
    os.utime(header, (later, later))
    assert [step.is_current() for step in steps] == [False, True]
    header.unlink()
    assert [step.is_current() for step in steps] == [False, True]


def test_rebuilt_library_is_another_file(tmp_path):
    """A process that has mapped the former library keeps it; in a changed file it would read other code."""
    library, linked = tmp_path / "_C.abi3.so", tmp_path / "linked.so"
    library.write_bytes(b"former")
    linked.write_bytes(b"new")
    with library.open("rb") as mapped:
        replace(library, linked)
        assert mapped.read() == b"former"
    assert library.read_bytes() == b"new"
    with pytest.raises(FileNotFoundError):
        replace(library, tmp_path / "absent.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_C.abi3.so", "linked.so"]
