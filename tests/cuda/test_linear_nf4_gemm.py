"""csrc/cuda/linear_nf4_gemm.cu, forward and transposed, against float64 (class 2), under the emulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support import cuda_host
from tests.support.tolerances import assert_within

from .launching import all_modes, library, needs_emulator, needs_nvcc, poisoned, ptx_under_sanitizers, same_bits
from .linear_problems import LinearProblem
from .planted import Fault, planted_tests

pytestmark = needs_emulator

STAGES, DEPTH = 4, 64
LONG = (STAGES + 1) * DEPTH + 32  # every stage is refilled, and the last step is half full

PROBLEMS = [
    LinearProblem(5, 70, LONG, dtype=torch.bfloat16, bias=torch.float32),
    LinearProblem(17, 131, 96, dtype=torch.float16, r=24, blocksize=32),
    LinearProblem(70, 129, LONG, dtype=torch.bfloat16, r=8, bias=torch.bfloat16, double=False),
    LinearProblem(1, 8, 32, dtype=torch.bfloat16, r=88),  # more LoRA steps than stages
    LinearProblem(33, 136, 512, dtype=torch.float16, blocksize=4096),
    LinearProblem(5, LONG + 8, 160, dtype=torch.bfloat16, bias=torch.float32, transposed=True),
    LinearProblem(19, 72, 288, dtype=torch.float16, r=40, blocksize=32, transposed=True),
    LinearProblem(65, LONG, 96, dtype=torch.bfloat16, r=16, transposed=True, double=False),
]
SPLIT = [
    LinearProblem(7, 40, 9 * DEPTH, dtype=torch.bfloat16, r=8, bias=torch.float16),
    LinearProblem(20, 9 * DEPTH, 64, dtype=torch.float16, r=8, bias=torch.float32, transposed=True),
]


def run(
    mode: str,
    problem: LinearProblem,
    splits: int = 1,
    seed: int = 1,
    order: str = "random",
    tested: cuda_host.Library | None = None,
) -> Tensor:
    y = problem.poisoned_y()
    partial = poisoned(splits, problem.M, problem.gemm_n, dtype=torch.float32) if splits > 1 else None
    tested = tested or library("linear_nf4_gemm", mode)
    assert tested.call("launch_linear_nf4_gemm", problem.gemm_args(y, partial), None, seed=seed, order=order) == 0
    return y


@all_modes
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_product(mode: str, problem: LinearProblem) -> None:
    assert_within(run(mode, problem), problem.expected(rounded=True), str(problem))


@all_modes
@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("problem", SPLIT, ids=str)
def test_split_contraction(mode: str, splits: int, problem: LinearProblem) -> None:
    assert_within(run(mode, problem, splits), problem.expected(rounded=True), str(problem))


@pytest.mark.parametrize("N", [40, 37])  # rows at 16-byte boundaries, and not
@pytest.mark.parametrize("bias", [None, torch.float16])
def test_parts_are_added_in_rows_of_any_width(N: int, bias: torch.dtype | None) -> None:
    problem = LinearProblem(3, N, 4 * DEPTH, dtype=torch.bfloat16, bias=bias)
    assert_within(run("asan", problem, 2), problem.expected(rounded=True), str(problem))


@pytest.mark.parametrize("problem", [PROBLEMS[2], PROBLEMS[7]], ids=str)
def test_schedules_agree_bit_for_bit(problem: LinearProblem) -> None:
    first = run("plain", problem)
    for order, seed in (("random", 2), ("random", 3), ("forward", 1), ("reverse", 1)):
        assert same_bits(run("plain", problem, seed=seed, order=order), first)


@needs_nvcc
@pytest.mark.parametrize("problem", PROBLEMS[:2] + PROBLEMS[5:7], ids=str)
def test_compiled_and_source_agree_bit_for_bit(problem: LinearProblem) -> None:
    assert same_bits(run("ptx", problem), run("plain", problem))


@needs_nvcc
@ptx_under_sanitizers
@pytest.mark.parametrize(("problem", "splits"), [(SPLIT[0], 2), (PROBLEMS[5], 1)], ids=str)
def test_compiled_under_sanitizers(mode: str, problem: LinearProblem, splits: int) -> None:
    assert_within(run(mode, problem, splits), problem.expected(rounded=True), str(problem))


BF16 = torch.bfloat16
PLANTED_IN = [
    # (problem, splits): a half last step; several blocks of rows, and a rank and blocks that end inside a step; grad_x
    # likewise; parts
    (PROBLEMS[0], 1),
    (LinearProblem(17, 131, 96, dtype=BF16, r=24, blocksize=32), 1),
    (PROBLEMS[5], 1),
    (LinearProblem(19, 72, 288, dtype=BF16, r=40, blocksize=32, transposed=True), 1),
    (SPLIT[0], 3),
    (LinearProblem(3, 37, 8 * DEPTH, dtype=BF16, r=8, bias=torch.float16), 2),
]
BARRIER = "__syncthreads();  // the stage is there for all"
ROUNDED = "float(round_to<T>(sum[row_half / 2][i % 4][row_half % 2 * 2 + i / 4])) + bias[i]"
FAULTS = [
    Fault("the high nibble of a byte", "word >> (8 * t + 2) & 0x3C", "word >> (8 * t) << 2 & 0x3C", 0),
    Fault("the column of a nibble of grad_x", "nibbles >> 10 & 0x3C", "nibbles >> 6 & 0x3C", 2),
    Fault("the absmax of a half step", "absmax[k_half * kBlockN + slot]", "absmax[slot]", 1),
    Fault("the absmax of a warp's columns", "absmax[n * 4 + warp]", "absmax[n * 4]", 2),
    Fault("the block of a weight", "first >> p.weight.block_shift", "(first >> p.weight.block_shift) + 1", 0),
    Fault("the x of a step", "k0 + column * 8", "column * 8", 0),
    Fault("the second block of rows", "int(blockIdx.y) * BLOCK_M", "0 * BLOCK_M", 1),
    Fault("the columns past the end", "row < rows && column < columns", "row < rows", 1),
    Fault("the rows past the end", "m >= p.M || n >= p.gemm_n", "n >= p.gemm_n", 3),
    Fault("the scaling", "p.scaling", "1.0f", 3),
    Fault("the low-rank term of every part", "p.lora_left && blockIdx.z == 0", "p.lora_left != nullptr", 4),
    Fault("the first step of a part", "first_step + step - lora_steps", "step - lora_steps", 4),
    Fault("the place of a part", "int64_t(blockIdx.z) * p.M * p.gemm_n + offset", "offset", 4),
    Fault("the last part", "part < splits", "part < splits - 1", 4),
    Fault("the bias of a sum of parts", "load_any(bias, n + i)", "0.0f", 5),
    Fault("the columns of a sum of parts", "min(int64_t(8), gemm_n - n)", "int64_t(8)", 5),
    Fault("no bias", "p.bias.data && !p.partial && n + i < p.gemm_n", "false", 0),
    Fault("the bias of every part", "p.bias.data && !p.partial", "p.bias.data != nullptr", 4),
    Fault("one rounding", "sum[row_half / 2][i % 4][row_half % 2 * 2 + i / 4] + bias[i]", ROUNDED, 0),
    Fault("the wait for a stage", "ptx::cp_async_wait<kStages - 2>();", "ptx::cp_async_wait<kStages - 1>();", 0),
    Fault("the barrier of a stage", BARRIER, "", 0),
]
"""Faults in the kernels, in weight_tiles.cuh and in split_sums.cuh; case: in PLANTED_IN."""

FEW_KERNELS = {
    "launch_gemm<T>(problem": "launch_gemm<__nv_bfloat16>(problem",
    "launch_tile<T, 32, Weights>": "launch_tile<T, 16, Weights>",
    "launch_tile<T, 64, Weights>": "launch_tile<T, 16, Weights>",
}
"""Leaves the kernels that the test runs, because compiling takes most of its time."""


def check_planted(tested: cuda_host.Library, case: int) -> None:
    problem, splits = PLANTED_IN[case]
    for seed in (1, 2):
        result = run("plain", problem, splits, seed, tested=tested)
        assert_within(result, problem.expected(rounded=True), str(problem))


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "linear_nf4_gemm", FAULTS, check_planted, FEW_KERNELS, ["weight_tiles.cuh", "split_sums.cuh"]
)


def test_split_count_fills_gpu() -> None:
    tested = library("linear_nf4_gemm", "plain")
    splits = [tested.call("linear_nf4_gemm_splits", *sizes, 108) for sizes in ((1, 4096, 4096), (64, 28672, 8192))]
    assert splits[0] == 6, "216 blocks wanted of 32"
    assert splits[1] == 1
    assert tested.call("linear_nf4_gemm_splits", 1, 128, 512, 108) == 1, (
        "a part is two fillings of the pipeline at least"
    )


@pytest.mark.parametrize(
    "change", [{"K": 40}, {"N": 12, "transposed": True}, {"r": 4}, {"dtype": torch.float32}], ids=str
)
def test_unsupported_problems_are_refused(change: dict) -> None:  # type: ignore[type-arg]
    problem = replace(LinearProblem(2, 16, 64, dtype=torch.bfloat16), **change)
    arguments = problem.gemm_args(problem.poisoned_y())
    assert library("linear_nf4_gemm", "plain").call("launch_linear_nf4_gemm", arguments, None) == 1
