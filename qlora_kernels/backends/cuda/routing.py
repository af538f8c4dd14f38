"""The choice of a product's kernel: a table for each GPU architecture, overridden by measurements on the GPU.

    in pair_rows              linear_nf4_pairs.cu: tensor cores, two codes by one table lookup; bf16, blocks of 64
    rows <= small_rows        linear_nf4_small_m.cu: bound by reading the packed weight once, products in fp32
    rows <= fused_rows        linear_nf4_gemm.cu: tensor cores, weights decoded in the main loop
    more, or awkward shapes   dequantize_nf4.cu into a scratch tensor, then torch.matmul
    only where asked for      linear_nf4_wgmma.cu: wgmma and TMA of Hopper GPUs

The rounding of the weight depends on the kernel (docs/format.md). QLORA_CUDA_PAIRS=0 leaves linear_nf4_pairs.cu out;
QLORA_CUDA_PAIRS=1 takes it for all numbers of rows that it serves, whose results then have the same bits for each of
these numbers. QLORA_CUDA_WGMMA=1 takes linear_nf4_wgmma.cu wherever it can run; it is no default before a GPU has run
it.

The bounds are those of the model in bench/roofline.py (`fused_rows`), which counts bytes, products and SASS
instructions. They are predicted, not run on a GPU; ops/tuned/sm_<capability>.json (ops/measured_plans.py) replaces
them shape by shape.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from ...ops import extended_k, measured_plans
from ...ops.operands import Weight
from ...ops.registry import KernelPlan, Problem, planned_rows
from ...rounding import cdiv, round_up
from .availability import built_for, holds_sm90a
from .lora_down import kernel_obstacle

SMALL_ROWS_FP32 = 16
"""Maximum number of rows of linear_nf4_small_m.cu in fp32, for which there is no tensor-core kernel."""

MOST_SMALL_ROWS = 16
"""Maximum number of rows of linear_nf4_small_m.cu."""

MOST_PAIR_ROWS = 64
"""Maximum number of rows of linear_nf4_pairs.cu."""

MOST_PAIR_TILE = 32
"""Maximum number of rows of x in a thread block of linear_nf4_pairs.cu."""

PAIRS_BLOCKSIZE, PAIRS_GROUP = 64, 256
"""The blocksize of linear_nf4_pairs.cu, and the number of which K must be a multiple there: four blocks."""


MOST_WGMMA_ROWS = 1024
"""Maximum number of rows of linear_nf4_wgmma.cu; beyond, a decoded weight serves enough rows."""

WGMMA_STEP = 64
"""The number of which K and the blocksize must be multiples in linear_nf4_wgmma.cu."""

WGMMA_CAPABILITY = 90
"""The one compute capability of linear_nf4_wgmma.cu."""


class Bounds(NamedTuple):
    """The numbers of rows of x for which each kernel is the default, in 16-bit dtypes.

    small_rows, fused_rows: the maximum.   pair_rows: the minimum and the maximum of each range.
    """

    small_rows: int
    fused_rows: int
    pair_rows: tuple[tuple[int, int], ...]

    def pair_range(self, M: int) -> tuple[int, int] | None:
        """Return the range of pair_rows that contains M, or None."""
        return next((found for found in self.pair_rows if found[0] <= M <= found[1]), None)


BOUNDS = {
    80: Bounds(4, 128, ((3, 16),)),
    86: Bounds(4, 64, ((5, 8), (17, 24), (33, 48))),
    89: Bounds(4, 128, ((5, 24), (33, 48))),
    90: Bounds(4, 192, ((2, 16),)),
    100: Bounds(4, 64, ((2, 32),)),
    120: Bounds(4, 64, ((5, 48),)),
}
"""Compute capability -> bounds; other capabilities use the nearest one below."""

SMALL_M, GEMM, DECODE = "linear_nf4_small_m.cu", "linear_nf4_gemm.cu", "dequantize_nf4.cu, then torch.matmul"
PAIRS, WGMMA = "linear_nf4_pairs.cu", "linear_nf4_wgmma.cu"
KERNELS = {"pairs": PAIRS, "small_m": SMALL_M, "fused": GEMM, "wgmma": WGMMA, "decode": DECODE}
"""Name of a path in tuned files -> name of its kernel."""

ON_REQUEST = ("wgmma",)
"""Paths that no default takes, because no GPU has run them. The GPU check runs them in steps of their own."""

ENVIRONMENT = "QLORA_CUDA_PAIRS"
"""The environment variable that leaves linear_nf4_pairs.cu out ("0") or takes it wherever it can run ("1")."""

WGMMA_ENVIRONMENT = "QLORA_CUDA_WGMMA"
"""The environment variable that takes linear_nf4_wgmma.cu wherever it can run ("1")."""


def bounds_of(capability: int) -> Bounds:
    """Return the table's row for a GPU."""
    known = [c for c in BOUNDS if c <= capability]
    return BOUNDS[max(known, default=min(BOUNDS))]


def route(problem: Problem, capability: int) -> KernelPlan:
    """Return the kernel of the base product of `problem` on a GPU of compute capability `capability` (90 for 9.0)."""
    backward = problem.op.endswith(("_grad_x", "_backward"))
    op = "linear_nf4_grad_x" if backward else "linear_nf4"
    rows = planned_rows(problem.M)
    base = problem._replace(op=op, M=rows, r=0, dropout=False)
    if _forced is not None and _forced in (KERNELS[path] for path in served_paths(base, capability)):
        return KernelPlan(_forced, _tile(_forced, rows), "use_path")
    return _route(base, capability, _pairs, _wgmma)


def addition_reason(
    op: str, M: int, weights: Sequence[Weight], dtype: torch.dtype, dropout: bool, capability: int
) -> str | None:
    """Why the low-rank terms of linears on one x are not inside base products over K + r (ops/extended_k.py), or None.

    op: a LoRA op, forward or backward, of one linear or of a group.
    """
    backward = op.endswith("_backward")
    if dtype == torch.float32:  # saves the rest for a dtype that is never served
        return kernel_obstacle(dtype, 0)
    for weight in weights:
        problem = Problem(op, "cuda", dtype, M, weight.N, weight.K, 0, weight.blocksize, weight.double_quant)
        if route(problem, capability).kernel != DECODE:
            return "the kernel that decodes inside adds it to its sums"
        if (reason := kernel_obstacle(dtype, weight.N if backward else weight.K)) is not None:
            return reason
    K, N = weights[0].K, sum(weight.N for weight in weights)
    if backward:
        return extended_k.backward_obstacle(K, N, len(weights), dropout, dtype, capability)
    return extended_k.forward_obstacle(K, N, dtype, capability)


def lora_plan(problem: Problem, capability: int) -> KernelPlan:
    """The kernel of a LoRA linear: that of its base product, and where the low-rank term is added."""
    base = route(problem, capability)
    if base.kernel != DECODE or problem.r == 0:
        return base
    if problem.op.startswith("linear_nf4_lora_merged"):
        return KernelPlan(extended_k.MERGED, {}, base.reason)
    shape_only = torch.empty(0)
    weight = Weight(shape_only, None, None, None, None, problem.blocksize, problem.N, problem.K)
    reason = addition_reason(problem.op, problem.M, [weight], problem.dtype, problem.dropout, capability)
    after = extended_k.INSIDE if reason is None else extended_k.ADDED
    return KernelPlan(f"dequantize_nf4.cu, then {after}", {}, "; ".join(filter(None, (base.reason, reason))))


_forced: str | None = None


def choice(variable: str, value: str | None) -> bool | None:
    """Return whether a kernel must not be chosen (False), must be (True), or may be (None).

    Raises ValueError for a value of the environment variable that is neither 0 nor 1.
    """
    if value not in (None, "", "0", "1"):
        raise ValueError(f"linear_nf4: {variable} must be 0 or 1, got {value!r}; unset it for the default")
    return value == "1" if value else None


_pairs, _wgmma = (choice(variable, os.environ.get(variable)) for variable in (ENVIRONMENT, WGMMA_ENVIRONMENT))


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Run the linears of this backend by one path of KERNELS inside the block, where it serves the problem: for tuning
    and tests.
    """
    global _forced
    before, _forced = _forced, KERNELS[path]
    try:
        yield
    finally:
        _forced = before


def served_paths(problem: Problem, capability: int) -> list[str]:
    """Return the paths of KERNELS that support a base product on a GPU of this compute capability."""
    if obstacle(problem) is not None:
        return ["decode"]
    backward, fp32 = problem.op == "linear_nf4_grad_x", problem.dtype == torch.float32
    pairs = ["pairs"] if pairs_obstacle(problem) is None else []
    small_m = [] if backward or problem.M > MOST_SMALL_ROWS else ["small_m"]
    wgmma = ["wgmma"] if wgmma_obstacle(problem, capability) is None else []
    return [*pairs, *small_m, *([] if fp32 else ["fused"]), *wgmma, "decode"]


@lru_cache(maxsize=4096)
def _route(problem: Problem, capability: int, pairs: bool | None, wgmma: bool | None) -> KernelPlan:
    if not wgmma:
        return _route_by_table(problem, capability, pairs)
    if pairs and pairs_obstacle(problem) is None and obstacle(problem) is None:
        return _route_by_table(problem, capability, pairs)
    reason = obstacle(problem) or wgmma_obstacle(problem, capability)
    if reason is None:
        return KernelPlan(WGMMA, wgmma_tile(problem.M), f"{WGMMA_ENVIRONMENT}=1")
    chosen = _route_by_table(problem, capability, pairs)
    return replace(chosen, reason=f"{chosen.reason}; {WGMMA} is left out: {reason}")


def _route_by_table(problem: Problem, capability: int, pairs: bool | None) -> KernelPlan:
    reason = obstacle(problem)
    if reason is not None:
        return KernelPlan(DECODE, {}, reason)
    pairs_reason = f"{ENVIRONMENT}=0" if pairs is False else pairs_obstacle(problem)
    paths = served_paths(problem, capability)
    served = [KERNELS[path] for path in paths if path != "pairs" or pairs_reason is None]
    if pairs and PAIRS in served:
        return KernelPlan(PAIRS, pairs_tile(problem.M), f"{ENVIRONMENT}=1")
    entry = measured_plans.entries(capability).get(measured_plans.bucket(problem))
    if entry is not None and entry["backend"] == "cuda" and KERNELS.get(entry["path"]) in served:
        kernel = KERNELS[entry["path"]]
        return KernelPlan(kernel, _tile(kernel, problem.M), "measured best")
    bounds = bounds_of(capability)
    pair_range = bounds.pair_range(problem.M)
    if PAIRS in served and pair_range is not None:
        fewest, most = pair_range
        tile = pairs_tile(problem.M)
        return KernelPlan(PAIRS, tile, f"{fewest} <= M={problem.M} <= {most}: tensor cores, two codes by one lookup")
    chosen = _route_without_pairs(problem, bounds, served)
    if problem.op == "linear_nf4" and pair_range is not None:
        return replace(chosen, reason=f"{chosen.reason}; {PAIRS} is left out: {pairs_reason}")
    return chosen


def _route_without_pairs(problem: Problem, bounds: Bounds, served: list[str]) -> KernelPlan:
    M, small_rows = problem.M, SMALL_ROWS_FP32 if problem.dtype == torch.float32 else bounds.small_rows
    if SMALL_M in served and small_rows >= M:
        return KernelPlan(SMALL_M, {}, f"M={M} <= {small_rows}: bound by reading the packed weight once")
    if GEMM not in served:
        return KernelPlan(DECODE, {}, "fp32 has no tensor-core kernel here")
    if bounds.fused_rows < M:
        return KernelPlan(
            DECODE, {}, f"M={M} > {bounds.fused_rows}: a fused kernel would decode each weight too many times"
        )
    return KernelPlan(GEMM, gemm_tile(M), f"M={M} <= {bounds.fused_rows}: tensor cores, weights decoded in the loop")


def obstacle(problem: Problem) -> str | None:
    """Return why no kernel with a fused decode supports a problem; None if one does."""
    if problem.K % 32:
        return f"K={problem.K} is not a multiple of 32, the weights of one 16-byte load"
    if problem.op == "linear_nf4_grad_x" and problem.N % 8:
        return f"N={problem.N} is not a multiple of 8, the elements of one 16-byte load of grad_y"
    return None


def pairs_obstacle(problem: Problem) -> str | None:
    """Return why linear_nf4_pairs.cu cannot run a base product, or None if it can."""
    if problem.op != "linear_nf4":
        return "it has no transposed product"
    if problem.dtype != torch.bfloat16:
        return f"x is {str(problem.dtype).removeprefix('torch.')}, not bfloat16"
    if problem.M > MOST_PAIR_ROWS:
        return f"M={problem.M} > {MOST_PAIR_ROWS}"
    if problem.blocksize != PAIRS_BLOCKSIZE:
        return f"blocksize {problem.blocksize} is not {PAIRS_BLOCKSIZE}"
    if problem.K % PAIRS_GROUP:
        return f"K={problem.K} is not a multiple of {PAIRS_GROUP}, four blocks"
    return None


def wgmma_obstacle(problem: Problem, capability: int) -> str | None:
    """Return why linear_nf4_wgmma.cu cannot run a base product on a GPU of this capability, or None if it can."""
    if capability != WGMMA_CAPABILITY:
        return f"the GPU is sm_{capability}, not sm_90"
    if problem.dtype == torch.float32:
        return "x is float32"
    if problem.M > MOST_WGMMA_ROWS:
        return f"M={problem.M} > {MOST_WGMMA_ROWS}"
    if problem.blocksize < WGMMA_STEP:
        return f"blocksize {problem.blocksize} is less than {WGMMA_STEP}"
    if problem.K % WGMMA_STEP:
        return f"K={problem.K} is not a multiple of {WGMMA_STEP}"
    if not holds_sm90a():
        return f"the library is built for {built_for()}, without sm_90a; rebuild it with QLORA_CUDA_ARCHS=90a"
    return None


def _tile(kernel: str, M: int) -> dict[str, int]:
    tiles = {GEMM: gemm_tile, PAIRS: pairs_tile, WGMMA: wgmma_tile}
    return tiles[kernel](M) if kernel in tiles else {}


def pairs_tile(M: int) -> dict[str, int]:
    """Return M_TILE and kPairsRows of csrc/cuda/linear_nf4_pairs.cu, rows of x and of w of a warp."""
    return {"block_m": round_up(cdiv(M, cdiv(M, MOST_PAIR_TILE)), 8), "block_n": 32}


def gemm_tile(M: int) -> dict[str, int]:
    """Return BLOCK_M, kBlockN and kBlockK of csrc/cuda/linear_nf4_gemm.cu."""
    return {"block_m": 16 if M <= 16 else 32 if M <= 32 else 64, "block_n": 128, "block_k": 64}


def wgmma_tile(M: int) -> dict[str, int]:
    """Return M_TILE, kWgmmaRows and kWgmmaBlockK of csrc/cuda/linear_nf4_wgmma.cu."""
    return {"block_m": 64 if M <= 64 else 128 if M <= 128 else 256, "block_n": 128, "block_k": 64}
