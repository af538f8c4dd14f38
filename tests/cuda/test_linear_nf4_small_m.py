"""csrc/cuda/linear_nf4_small_m.cu against float64 (class 2), under the emulator."""

import pytest
import torch
from torch import Tensor

from tests.support import cuda_host
from tests.support.tolerances import assert_within

from .launch_args import nf4_weight, small_m_args
from .launching import all_modes, library, needs_emulator, needs_nvcc, ptx_under_sanitizers, same_bits
from .linear_problems import LinearProblem
from .planted import Fault, planted_tests

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


def run(
    mode: str, problem: LinearProblem, seed: int = 1, order: str = "random", tested: cuda_host.Library | None = None
) -> Tensor:
    y = problem.poisoned_y()
    tested = tested or library("linear_nf4_small_m", mode)
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


BF16 = torch.bfloat16
PLANTED_IN = [
    # every stage is refilled; short blocks, a rank above 32, a tail; many rows; warps that share rows, with LoRA
    LinearProblem(1, 5, LONG, dtype=BF16),
    LinearProblem(3, 6, 1056, dtype=BF16, r=40, lora_dtype=torch.float32, blocksize=32),
    LinearProblem(13, 11, 1088, dtype=BF16, r=3, bias=torch.float32),
    LinearProblem(1, 6, 4128, dtype=BF16, r=8, bias=BF16),
]
STAGE = "stage == 0 ? kSmallMStages - 1 : stage - 1"
FAULTS = [
    Fault("the stage that is refilled", STAGE, "stage", 0),
    Fault("the high nibbles", "__byte_perm(even, 0, 0x4440 + i)", "__byte_perm(odd, 0, i + 0x4440)", 2),
    Fault("the order of bytes", "__byte_perm(odd, 0, 0x4440 + i)", "__byte_perm(odd, 0, 0x4443 - i)", 2),
    Fault("the value of a constant", "table.value[raw.q]", "table.value[255]", 2),
    Fault("the absmax_scale of a block", "block >> scale_shift_", "(block >> scale_shift_) * 0", 0),
    Fault(
        "the wait for a stage", "ptx::cp_async_wait<kSmallMStages - 2>();", "ptx::cp_async_wait<kSmallMStages>();", 0
    ),
    Fault("the barrier of a stage", "__syncwarp();  // every lane's bytes are there", "", 0),
    Fault(
        "the constants of the next step", "load_absmax(raw, index + p.warps_per_row);", "load_absmax(raw, index);", 0
    ),
    Fault("the block of a lane", "lane / 4 + step * 8", "lane / 8 + step * 8", 2),
    Fault("the end of a row", "index * kSmallMFetchK + lane * 8 + step * 256 < p.K", "true", 1),
    Fault("the rows past the end", "m >= p.M || n >= p.N", "m >= p.M", 0),
    Fault("the row of x", "int64_t(m) * p.K + step * 256", "step * 256", 2),
    Fault("the bias", "p.bias.data ? load_any(p.bias, n) : 0.0f", "0.0f", 2),
    Fault("the scaling", "p.scaling * load_any(p.lora_B, n * p.r + j)", "load_any(p.lora_B, j + n * p.r)", 1),
    Fault("the low-rank term of every warp", "p.s && part == 0", "p.s != nullptr", 3),
    Fault("the row of lora_B", "n * p.r + j", "int64_t(n0) * p.r + j", 1),
    Fault("the sums of the other warps", "other < p.warps_per_row", "other < 1", 3),
    Fault(
        "the sum over lanes",
        "total += __shfl_xor_sync(kWholeWarp, total, distance);",
        "if (distance > 1) total += __shfl_xor_sync(kWholeWarp, total, distance);",
        2,
    ),
]
"""Faults in the kernel and in nf4.cuh; case: in PLANTED_IN."""

FEW_KERNELS = {
    "launch_small_m<T>(*args": "launch_small_m<__nv_bfloat16>(*args",
    "launch_small_m_tile<T, 2, 4>": "launch_small_m_tile<T, 4, 4>",
    "launch_small_m_tile<T, 8, 2>": "launch_small_m_tile<T, 16, 2>",
}
"""Leaves the kernels that the test runs, because compiling takes most of its time."""


def check_planted(tested: cuda_host.Library, case: int) -> None:
    problem = PLANTED_IN[case]
    for seed in (1, 2):
        assert_within(run("plain", problem, seed, tested=tested), problem.expected(rounded=False), str(problem))


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "linear_nf4_small_m", FAULTS, check_planted, FEW_KERNELS, ["nf4.cuh"]
)


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
