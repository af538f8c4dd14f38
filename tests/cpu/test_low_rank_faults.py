"""Faults planted in the sources of the CPU's low-rank products and groups of linears, and the driver that detects them.

The sources are compiled without optimization, for avx512_bf16, whose low-rank product continues the sums of the large
one. The library's own tests compare every instruction set with references.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from python.build_support.cpu import COMMON_FLAGS, X86_FLAGS
from python.build_support.native import CSRC
from qlora_kernels.backends import cpu

COMPILER = shutil.which("g++") or shutil.which("clang++")
DRIVER = Path(__file__).parent / "low_rank" / "driver.cpp"
FORWARD, BACKWARD = "linear_nf4_lora.cpp", "linear_nf4_lora_backward.cpp"
SOURCES = (FORWARD, BACKWARD, "dropout.cpp", "workspace.cpp")

MUTATIONS = {
    "the low-rank product is lost": ("gemm.h", "if (steps == 0 && tail.steps > 0) {", "if (false) {", FORWARD),
    "it is added to every weight of a group": ("gemm.h", "end == step0 + count ? tail : Tail<Mac>()", "tail", BACKWARD),
    "all tiles take its first rows": ("gemm.h", "return {data + tiling.begin(t) * stride,", "return {data,", FORWARD),
    "all strips share one factor": ("lora.h", "column0 / kColumns % kMaxGroup * size", "0 * size", FORWARD),
    "all linears take the first s": (FORWARD, "terms[i].lhs.data += padded.begin(i);", "", FORWARD),
    "dropout does not act on it in grad_x": (BACKWARD, "return bits || R == 0 ?", "return R == 0 ?", BACKWARD),
}
"""Fault -> (file, text, replacement, source that is compiled with it)."""


def runs_here() -> bool:
    """Whether this machine has the instruction set of the test."""
    if cpu.unavailable() is not None:
        return False
    try:
        return cpu.instruction_set("avx512_bf16") == "avx512_bf16"
    except ValueError:
        return False
    finally:
        cpu.instruction_set("")


pytestmark = pytest.mark.skipif(COMPILER is None or not runs_here(), reason="needs a C++ compiler and AVX512-BF16")


def compile_to(output: Path, source: Path, *includes: Path) -> Path:
    flags = [flag for flag in COMMON_FLAGS if not flag.startswith("-O")]
    definitions = ("-DQLORA_ISA=avx512_bf16", "-DQLORA_X86_KERNELS")
    folders = [f"-I{folder}" for folder in (*includes, CSRC / "cpu", CSRC / "include")]
    command = [COMPILER, *flags, "-O0", *X86_FLAGS["avx512_bf16"], *definitions, *folders]
    subprocess.run([*command, "-c", source, "-o", output], check=True)
    return output


def run_linked(folder: Path, objects: list[Path]) -> subprocess.CompletedProcess[str]:
    program = folder / "driver"
    subprocess.run([COMPILER, *objects, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Return name -> object of the unchanged sources and of the driver."""
    folder = tmp_path_factory.mktemp("objects")
    sources = [*(CSRC / "cpu" / name for name in SOURCES), DRIVER]
    return {source.name: compile_to(folder / f"{source.stem}.o", source) for source in sources}


def test_kernels_pass_unmutated(objects, tmp_path):
    done = run_linked(tmp_path, list(objects.values()))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("fault", MUTATIONS)
def test_fault_is_detected(objects, tmp_path, fault):
    file, old, new, compiled = MUTATIONS[fault]
    kernels = tmp_path / "cpu"
    shutil.copytree(CSRC / "cpu", kernels)
    source = (kernels / file).read_text(encoding="utf-8")
    assert old in source, f"{file} no longer contains {old!r}: bring the mutation up to date"
    (kernels / file).write_text(source.replace(old, new), encoding="utf-8")
    mutated = compile_to(tmp_path / "mutated.o", kernels / compiled, kernels)
    done = run_linked(tmp_path, [mutated, *(path for name, path in objects.items() if name != compiled)])
    assert done.returncode == 1, "the fault was not detected"
    assert "differs" in done.stdout
