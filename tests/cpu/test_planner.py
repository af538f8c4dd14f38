"""The plans of `info --plan` follow the rules in the C++ sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qlora_kernels.backends.cpu import planner as cpu
from qlora_kernels.ops.registry import Problem

CPU = Path(__file__).parents[2] / "csrc" / "cpu"


def number(file: str, pattern: str) -> list[int]:
    """Return the numbers that a pattern captures in a C++ source."""
    return [int(value) for value in re.findall(pattern, (CPU / file).read_text(encoding="utf-8"))]


def test_rules_equal_the_sources():
    # In gemm.h and dots.h, AVX-512 comes first, then the other sets in the order of the preprocessor's branches.
    assert number("gemm.h", r"kMaxRows = (\d+);") == [cpu.SETS[name].rows for name in ("avx512", "avx2", "portable")]
    of_neon = ("avx512", "neon", "avx2")
    assert number("dots.h", r"kTileTokens = (\d+);") == [cpu.SETS[name].tokens for name in of_neon]
    assert number("dots.h", r"kDirectTokens = (\d+);") == [cpu.SETS[name].direct for name in of_neon]
    for name in ("avx512", "avx2", "neon", "portable"):
        assert number(f"simd_{name}.h", r"kLanes = (\d+);") == [cpu.SETS[name].lanes]
    assert "M <= (w.K < 1024 ? 32 : 64)" in (CPU / "dots.h").read_text(encoding="utf-8")
    assert number("fma_for_bf16.cpp", r"kFewTokens = (\d+);") == [cpu.FEW_TOKENS_OF_FMA]
    assert "p.dtype == DType::kBfloat16 && p.M > 1;" in (CPU / "amx" / "linear_nf4.cpp").read_text(encoding="utf-8")
    assert "if (group.M > kDirectTokens) return false;" in (CPU / "linear_nf4_lora.cpp").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("op", "M", "K", "isa", "tile", "words"),
    [
        ("linear_nf4", 1, 4096, "avx512_bf16", {"rows": 4, "tokens": 1}, "M=1 <= 8"),
        ("linear_nf4", 8, 4096, "avx512_bf16", {"rows": 2, "tokens": 8}, "M=8 <= 8"),
        ("linear_nf4", 64, 4096, "avx512_bf16", {"rows": 4, "tokens": 6}, "M=64 <= 64"),
        ("linear_nf4", 33, 512, "avx512_bf16", {"rows": 11, "columns": 32}, "M=33 > 32"),
        ("linear_nf4", 16, 4096, "avx2", {"rows": 4, "tokens": 3}, "M=16 <= 64"),
        ("linear_nf4", 8, 4000, "avx512_bf16", {"rows": 8, "columns": 32}, "K=4000 in blocks of 64"),
        ("linear_nf4_lora", 16, 4096, "avx512_bf16", {"rows": 8, "columns": 32}, "M=16 > 8"),
        ("linear_nf4_lora_group", 16, 4096, "avx512_bf16", {"rows": 8, "columns": 32}, "M=16 > 8"),
        ("linear_nf4_lora_group_backward", 16, 4096, "amx_bf16", {"rows": 16, "columns": 16, "k": 32}, "AMX tiles"),
        ("linear_nf4_grad_x", 1, 4096, "neon", {"rows": 1, "columns": 8}, "gradients always"),
        ("linear_nf4", 2, 4096, "amx_bf16", {"rows": 16, "columns": 16, "k": 32}, "AMX tiles"),
        ("linear_nf4", 1, 4096, "amx_bf16", {"rows": 4, "tokens": 1}, "dot products"),
        ("linear_nf4", 128, 4096, "avx512_bf16_fma", {"rows": 12, "columns": 32}, "M=128 > 64"),
    ],
)
def test_kernel_and_tile(op, M, K, isa, tile, words):
    plan = cpu.plan(Problem(op, "cpu", torch.bfloat16, M, 4096, K), isa)
    assert plan.tile == tile
    assert words in plan.reason
    assert (CPU.parents[1] / plan.kernel.partition(" ")[0]).exists()


def test_other_ops_have_one_kernel():
    plan = cpu.plan(Problem("quantize_nf4", "cpu", torch.float32), "avx2")
    assert plan.tile == {}
    assert plan.kernel == "csrc/cpu/quantize_nf4.cpp for avx2"
