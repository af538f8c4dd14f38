"""csrc/cuda/linear_nf4_small_m.cu against float64 (class 2), under the emulator."""

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import assert_within

from .launch_args import nf4_weight, small_m_args
from .launching import all_modes, library, needs_emulator, needs_nvcc, ptx_under_sanitizers, same_bits
from .linear_problems import LinearProblem

pytestmark = needs_emulator

WARPS, STAGES, DEPTH = 4, 3, 1024
LONG = WARPS * (STAGES + 1) * DEPTH + 3 * DEPTH + 32  # a warp fetches five times: every stage is refilled; a tail of 32

PROBLEMS = [
    LinearProblem(1, 5, LONG, dtype=torch.bfloat16),
    LinearProblem(1, 9, 4128, dtype=torch.bfloat16),
    LinearProblem(1, 3, 96, dtype=torch.float32, double=False, bias=torch.float32),
    LinearProblem(2, 17, 1024, dtype=torch.float16, r=5, bias=torch.bfloat16),
    LinearProblem(3, 6, 1056, dtype=torch.bfloat16, r=40, lora_dtype=torch.float32, blocksize=32),
    LinearProblem(7, 5, 2080, dtype=torch.bfloat16, bias=torch.float16, blocksize=4096),
    LinearProblem(16, 4, 992, dtype=torch.float16, r=8, blocksize=128),
    LinearProblem(13, 11, 64, dtype=torch.float32, r=3),
]


def run(mode: str, problem: LinearProblem, seed: int = 1, order: str = "random") -> Tensor:
    y = problem.poisoned_y()
    tested = library("linear_nf4_small_m", mode)
    assert tested.call("launch_linear_nf4_small_m", problem.small_m_args(y), None, seed=seed, order=order) == 0
    return y


@all_modes
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward(mode: str, problem: LinearProblem) -> None:
    # W is not rounded to x's dtype, because absmax multiplies fp32 sums of eight code values.
    assert_within(run(mode, problem), problem.expected(rounded=False), str(problem))


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    assert_within(run(mode, PROBLEMS[4]), PROBLEMS[4].expected(rounded=False), str(PROBLEMS[4]))


@needs_nvcc
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_compiled_and_source_agree_bit_for_bit(problem: LinearProblem) -> None:
    assert same_bits(run("ptx", problem), run("plain", problem))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_schedules_agree_bit_for_bit(problem: LinearProblem) -> None:
    first = run("plain", problem)
    for order, seed in (("random", 2), ("random", 3), ("forward", 1), ("reverse", 1)):
        assert same_bits(run("plain", problem, seed, order), first)


@pytest.mark.parametrize(
    ("N", "K", "multiprocessors", "expected"),
    [
        (4096, 4096, 132, 2),
        (1024, 4096, 132, 4),
        (5120, 5120, 132, 2),
        (1024, 1024, 132, 1),
        (14336, 4096, 132, 1),
        (4096, 4096, 20, 1),
    ],
)
def test_warps_share_a_row_where_rows_do_not_fill_the_gpu(N: int, K: int, multiprocessors: int, expected: int) -> None:
    tested = library("linear_nf4_small_m", "plain")
    assert tested.call("linear_nf4_small_m_warps_per_row", 1, N, K, multiprocessors) == expected


@pytest.mark.parametrize(("M", "K"), [(17, 64), (0, 64), (1, 40)])
def test_unsupported_problems_are_refused(M: int, K: int) -> None:
    tested, memory = library("linear_nf4_small_m", "plain"), torch.zeros(4096)
    weight = nf4_weight(memory, (memory, None, None, None), 64, 1, K)
    arguments = small_m_args(memory, weight, None, (None, None, 0.0), torch.zeros(64), M)
    assert tested.call("launch_linear_nf4_small_m", arguments, None) == 1
