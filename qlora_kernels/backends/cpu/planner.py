"""The kernel and tile that the native library uses for a linear op: the data of `qlora-kernels info --plan`.

The library itself chooses in C++. This module has the same rules; tests/cpu/test_planner.py compares the numbers with
the sources: csrc/cpu/dots.h (`suits_dots`, tokens of a tile), gemm.h (rows of a tile), fma_for_bf16.cpp and
amx/linear_nf4.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...ops.registry import KernelPlan, Problem
from ...rounding import cdiv


class InstructionSet(NamedTuple):
    """The register tiles of an instruction set.

    lanes: fp32 numbers of a vector.   rows: maximum rows of a panel tile.   tokens: tokens of a tile of dot products.
    direct: up to this number of tokens, decoded vectors are multiplied without being stored.
    """

    lanes: int
    rows: int
    tokens: int
    direct: int


SETS = {
    "avx512_bf16": InstructionSet(16, 12, 6, 8),
    "avx512": InstructionSet(16, 12, 6, 8),
    "avx2": InstructionSet(8, 6, 3, 4),
    "neon": InstructionSet(4, 12, 6, 4),
    "portable": InstructionSet(4, 4, 3, 4),
}
FORWARD = ("linear_nf4", "linear_nf4_lora", "linear_nf4_lora_group")
BACKWARD = ("linear_nf4_grad_x", "linear_nf4_lora_backward", "linear_nf4_lora_group_backward")
FEW_TOKENS_OF_FMA = 8
"""Number of bf16 tokens from which avx512_bf16_fma uses the fp32 multiply-adds of avx512."""


def plan(problem: Problem, isa: str) -> KernelPlan:
    """Return the kernel and tile of a linear op on an instruction set, one of `cpu_isa`; a plain name for other ops."""
    op = problem.op.replace("_group", "")  # groups and single linears are one source; AMX runs a group's members alone
    source = f"csrc/cpu/{op}.cpp"
    if problem.op not in (*FORWARD, *BACKWARD) or not problem.M:
        return KernelPlan(f"{source} for {isa}", {}, "the backend's only kernel of this op")
    bf16, tokens = problem.dtype == torch.bfloat16, problem.M
    if isa.startswith("amx_bf16"):
        if bf16 and tokens > 1:
            kernel = f"csrc/cpu/amx/{op.replace('lora_backward', 'grad_x').replace('_lora', '')}.cpp for {isa}"
            return KernelPlan(kernel, {"rows": 16, "columns": 16, "k": 32}, f"bf16 and M={tokens} > 1: AMX tiles")
        isa = "avx512_bf16"
    if isa == "avx512_bf16_fma":
        isa = "avx512" if bf16 and tokens > FEW_TOKENS_OF_FMA else "avx512_bf16"
    registers = SETS[isa]
    kernel = f"{source} for {isa}"
    elements = registers.lanes * (2 if bf16 and isa == "avx512_bf16" else 1)
    limit = registers.direct if op == "linear_nf4_lora" else dots_limit(problem.K)
    fits = problem.K % problem.blocksize == 0 and problem.blocksize % (2 * elements) == 0
    if problem.op in FORWARD and tokens <= limit and fits:
        if tokens <= registers.direct:
            tile = {"rows": 4 if tokens <= registers.direct // 2 else 2, "tokens": tokens}
            return KernelPlan(
                kernel, tile, f"M={tokens} <= {registers.direct}: dot products of decoded registers (dots.h)"
            )
        tile = {"rows": 4, "tokens": evenly(tokens, registers.tokens)}
        return KernelPlan(kernel, tile, f"M={tokens} <= {limit}: dot products of rows decoded into L1 (dots.h)")
    tile = {"rows": evenly(tokens, registers.rows), "columns": 2 * registers.lanes}
    if problem.op in BACKWARD:
        reason = "gradients always use panels decoded into L2 (gemm.h)"
    elif not fits:
        reason = f"K={problem.K} in blocks of {problem.blocksize} does not fit dot products: panels in L2 (gemm.h)"
    else:
        reason = f"M={tokens} > {limit}: panels decoded once into L2 for all tokens (gemm.h)"
    return KernelPlan(kernel, tile, reason)


def dots_limit(K: int) -> int:
    """Return the largest M for which rows of K elements are multiplied as dot products."""
    return 32 if K < 1024 else 64


def evenly(count: int, limit: int) -> int:
    """Return the size of the largest part of `count` items, divided evenly into parts of at most `limit`."""
    parts = cdiv(count, limit)
    return cdiv(count, parts)
