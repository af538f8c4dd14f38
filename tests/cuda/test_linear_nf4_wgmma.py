"""csrc/cuda/linear_nf4_wgmma.cu against float64 (class 2), and against linear_nf4_gemm, under the emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_kernels.format import reference
from tests.support import cuda_host
from tests.support.tolerances import assert_within

from .launching import all_modes, library, needs_emulator, needs_nvcc, poisoned, ptx_under_sanitizers, same_bits, source
from .linear_problems import LinearProblem
from .planted import Fault, planted_tests

pytestmark = needs_emulator

BF16, FP16 = torch.bfloat16, torch.float16
STEP, STAGES, WARPS = 64, 4, 8
GROUP = STAGES * STEP
LONG = 2 * GROUP + STEP  # every stage is refilled, and the last group has one step that exists

PROBLEMS = [
    LinearProblem(5, 70, LONG, dtype=BF16, bias=torch.float32),  # one tile, part of its rows
    LinearProblem(65, 131, GROUP, dtype=FP16, r=24),  # 128 rows of x; two blocks of rows of w; a rank inside a step
    LinearProblem(70, 129, 2 * STEP, dtype=BF16, r=8, bias=BF16, double=False),
    LinearProblem(1, 8, STEP, dtype=BF16, r=200),  # four steps of LoRA, one of weights
    LinearProblem(33, 136, LONG, dtype=FP16, blocksize=4096),  # blocks that are longer than a row
    LinearProblem(130, 136, GROUP + 2 * STEP, dtype=BF16, r=64, blocksize=128, bias=FP16),  # 256 rows of x
    LinearProblem(257, 64, STEP, dtype=FP16, double=False),  # two tiles of x
    LinearProblem(5, LONG + 8, 3 * STEP, dtype=BF16, bias=torch.float32, transposed=True),
    LinearProblem(65, 72, 5 * STEP, dtype=FP16, r=40, blocksize=128, transposed=True),
    LinearProblem(130, LONG, STEP, dtype=BF16, r=200, transposed=True, double=False),
]
SPLIT = [
    LinearProblem(7, 40, 3 * GROUP + STEP, dtype=BF16, r=8, bias=FP16),
    LinearProblem(66, 37, 2 * GROUP, dtype=FP16, bias=torch.float32),
    LinearProblem(20, 3 * GROUP, STEP, dtype=BF16, r=8, bias=torch.float32, transposed=True),
]


def run(
    mode: str,
    problem: LinearProblem,
    splits: int = 1,
    seed: int = 1,
    order: str = "random",
    tested: cuda_host.Library | None = None,
    stem: str = "linear_nf4_wgmma",
) -> Tensor:
    y = problem.poisoned_y()
    partial = poisoned(splits, problem.M, problem.gemm_n, dtype=torch.float32) if splits > 1 else None
    tested = tested or library(stem, mode)
    assert tested.call(f"launch_{stem}", problem.gemm_args(y, partial), None, seed=seed, order=order) == 0
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


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[1], PROBLEMS[5], PROBLEMS[8]], ids=str)
def test_schedules_agree_bit_for_bit(problem: LinearProblem) -> None:
    first = run("plain", problem)
    for order, seed in (("random", 2), ("random", 3), ("forward", 1), ("reverse", 1), ("warp-priority", 4)):
        assert same_bits(run("plain", problem, seed=seed, order=order), first)


@needs_nvcc
@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[1], PROBLEMS[5], PROBLEMS[8]], ids=str)
def test_compiled_and_source_agree_bit_for_bit(problem: LinearProblem) -> None:
    assert same_bits(run("ptx", problem), run("plain", problem))


@needs_nvcc
@ptx_under_sanitizers
@pytest.mark.parametrize(("problem", "splits"), [(SPLIT[0], 2), (PROBLEMS[0], 1), (PROBLEMS[7], 1)], ids=str)
def test_compiled_under_sanitizers(mode: str, problem: LinearProblem, splits: int) -> None:
    assert_within(run(mode, problem, splits), problem.expected(rounded=True), str(problem))


@needs_nvcc
@pytest.mark.parametrize(
    "problem",
    [
        LinearProblem(5, 70, LONG, dtype=BF16, double=False),
        LinearProblem(5, LONG, 2 * STEP, dtype=BF16, double=False, transposed=True),
    ],
    ids=str,
)
def test_lookups_and_packed_reads_have_no_bank_conflicts(problem: LinearProblem) -> None:
    """With plain absmax, no access of the main loop; the sums are written and read back with conflicts at the end."""
    steps = 3 * STAGES
    tested = library("linear_nf4_wgmma", "ptx")
    tested.count_banks()
    run("ptx", problem)
    counts = tested.bank_counts()
    tested.count_banks(enabled=False)
    lookups = [count for count in counts if count.wavefronts == count.needed == 2 * count.instructions]
    assert sum(count.instructions for count in lookups) == WARPS * 16 * steps, "8 bytes a lane"
    reads_at_the_end = 2 * -(-problem.M * 128 // 8 // 32)
    writes_at_the_end = WARPS * 64 // 2 if problem.transposed else 0
    conflicts = sum(count.instructions for count in counts if count.wavefronts > count.needed)
    assert conflicts <= reads_at_the_end + writes_at_the_end


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_rounded_once(transposed: bool) -> None:
    """Rows of x that select one column, or one row, each give the weight's bytes as dequantization writes them."""
    N, K = (GROUP, 2 * STEP) if transposed else (40, GROUP)
    problem = LinearProblem(GROUP, N, K, dtype=BF16, transposed=transposed)
    problem.tensors["x"].copy_(torch.eye(GROUP))
    w = reference.dequantize_nf4(problem.tensors["packed"], problem.tensors["absmax"], 64, torch.Size((N, K)), BF16)
    y = run("plain", problem)
    assert same_bits(y if transposed else y.T.contiguous(), w)


@pytest.mark.parametrize("transposed", [False, True])
def test_steps_past_the_end_add_nothing(transposed: bool) -> None:
    """Their absmax is zero, and not the last one, whose product with their zeros may be no number."""
    N, row = (16, 15) if transposed else (16, 5)
    problem = LinearProblem(3, N, STEP, dtype=BF16, double=False, transposed=transposed)
    problem.tensors["absmax"][row] = torch.inf
    problem.tensors["packed"][row * STEP // 2 : (row + 1) * STEP // 2] = 0xFF  # the code 1
    problem.tensors["x"].fill_(1.0)
    y = run("plain", problem)
    if transposed:
        assert (y == torch.inf).all()
    else:
        assert (y[:, row] == torch.inf).all()
        assert y[:, torch.arange(16) != row].isfinite().all()


PLANTED_IN = [
    (PROBLEMS[0], 1),
    (LinearProblem(65, 131, GROUP, dtype=BF16, r=24), 1),
    (LinearProblem(1, 8, STEP, dtype=BF16, r=200), 1),
    (LinearProblem(70, 129, 2 * STEP, dtype=BF16, r=8, bias=BF16, blocksize=128), 1),
    (SPLIT[0], 3),
    (LinearProblem(9, 37, 2 * GROUP, dtype=BF16, bias=torch.float32), 2),
    (LinearProblem(1, 8, 12 * GROUP, dtype=BF16), 1),
    (PROBLEMS[7], 1),
    (LinearProblem(20, 72, 5 * STEP, dtype=BF16, r=40, blocksize=128, transposed=True), 1),
]
BLOCK = "(first_block_[i] + min(step + t_, steps_ - 1)) >> shift_"
BLOCK_OF_COLUMNS = "(int(blockIdx.x) * kWgmmaRows + warp * 16) / kWgmmaBlockK"
LAST_ROW = "min(int(blockIdx.x) * kWgmmaRows + output(warp, lane, i), p.N - 1)"
SHUFFLE = "__shfl_sync(kWholeWarp, absmax_[1], stage, 4)"
WAIT = "ptx::barrier_wait(shared.full(stage), step / kWgmmaStages % 2);"
COPY = "TRANSPOSED ? k0 : n0"
ARRIVALS = "ptx::barrier_init(shared_.empty(stage), kWgmmaWarps);"
FAULTS = [
    Fault("the byte of a lane", "0x5504 | byte << 4", "0x5504 | (byte ^ 1) << 4", 0),
    Fault("the codes of a byte", "__fmul_rn(pair.x, scale_[i])", "__fmul_rn(pair.y, scale_[i])", 0),
    Fault("the place of a packed row", "(row / 4 % 2) * 16", "0 * 16", 0),
    Fault("the second half of a packed row", "piece_ ^ half * 16", "piece_ ^ 0 * half", 0),
    Fault("the register of a word", "j % 2 * 2 + i", "j % 2 + 2 * i", 0),
    Fault("the absmax of a step", SHUFFLE, SHUFFLE.replace("stage", "0"), 0),
    Fault("the constants of later groups", "load(step + kWgmmaStages);", "load(0);", 0),
    Fault("the block of a step", BLOCK, BLOCK.replace("shift_", "0"), 3),
    Fault(
        "the first step of a part",
        "n * uint32_t(p.K / kWgmmaBlockK) + first_step",
        "n * uint32_t(p.K / kWgmmaBlockK)",
        4,
    ),
    Fault("the x of a part", "int(blockIdx.z) * p_.steps_per_split + step", "step", 4),
    Fault("the packed rows of a block", COPY, COPY.replace("k0 : n0", "k0 : 0"), 3),
    Fault("the tile of x of a stage", "first_tile + stage * kTile", "first_tile", 0),
    Fault("the steps of 16", "tile + 2 * step", "tile", 0),
    Fault("the scaling", "sum[i] *= p.scaling;", "", 1),
    Fault("the low-rank term of every part", "p.lora_left && blockIdx.z == 0", "p.lora_left != nullptr", 4),
    Fault("the columns of lora_right", "load_right(a, p, n, step * kWgmmaBlockK, t);", "load_right(a, p, n, 0, t);", 2),
    Fault("the tile of lora_left", "first_tile + left_stage(step) * kTile", "first_tile + left_stage(0) * kTile", 2),
    Fault("the phase of lora_left", "step / 2 % 2", "0", 2),
    Fault("the wait for a stage", WAIT, "", 0),
    Fault("the phase of a stage", "step / kWgmmaStages % 2", "0", 0),
    Fault("the phase of an empty stage", "(unsigned(step) / kWgmmaStages - 1) % 2", "1u", 0),
    Fault("the bytes of a stage", "sizeof shared_.x[0] + sizeof shared_.packed[0]", "sizeof shared_.x[0]", 0),
    Fault("the arrivals of a stage", ARRIVALS, ARRIVALS.replace("kWgmmaWarps", "kWgmmaWarps - 1"), 6),
    Fault(
        "the release of a stage", "ptx::barrier_arrive(shared.empty((stage + kWgmmaStages - 1) % kWgmmaStages));", "", 0
    ),
    Fault("a release too early", "(stage + kWgmmaStages - 1) % kWgmmaStages", "stage", 0),
    Fault("the fence of the barriers", "ptx::barrier_fence();", "", 0),
    Fault("the fence before products", "ptx::wgmma_fence();", "", 0),
    Fault("the wait for the previous products", "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();", 0),
    Fault("the wait for LoRA's products", "ptx::wgmma_wait<0>();\n        __syncthreads();", "__syncthreads();", 1),
    Fault("the wait for the last products", "ptx::wgmma_wait<0>();  // the last", "", 0),
    Fault("the row of a sum", "output[i / 2 % 2]", "output[0]", 0),
    Fault("the columns of a byte", "warp * 16 + lane / 4 * 2 + i", "warp * 16 + lane / 4 + i * 8", 7),
    Fault("the byte of a column", "lane / 4 % 4", "lane % 4", 7),
    Fault("the word of a column", "lane / 16 * 4", "0 * lane", 7),
    Fault("the place of a packed piece", "(warp / 2 ^ t) * 16", "warp / 2 * 16", 7),
    Fault("the row of a packed word", "(i * 8 + j) * kColumnBytes", "i * 8 * kColumnBytes", 7),
    Fault("the absmax of the second half", "absmax_[i / 4]", "absmax_[0]", 7),
    Fault("the absmax of a row", "i % 4 * 8 + threadIdx.x % 4 * 2 + j", "i % 4 * 8 + threadIdx.x % 4 * 2", 7),
    Fault("the constants of the next stage", "load(step + 1);", "load(step);", 7),
    Fault("the blocks of the columns", BLOCK_OF_COLUMNS, "0", 8),
    Fault("the columns of lora_A", "min(n0 + output[1], p.gemm_n - 1)", "min(n0 + output[0], p.gemm_n - 1)", 8),
    Fault("no bias", "value[k] += bias[k];", "", 0),
    Fault("the place of a part", "int64_t(blockIdx.z) * p.M * p.gemm_n + offset", "offset", 4),
    Fault("the last part", "part < splits", "part < splits - 1", 4),
    Fault("the bias of every part", "p.bias.data && !p.partial", "p.bias.data != nullptr", 5),
]
"""Faults in the kernel, in wgmma_stages.cuh, wgmma_weights.cuh and split_sums.cuh; case: in PLANTED_IN."""

FEW_KERNELS = {
    "launch_wgmma<T>(problem": "launch_wgmma<__nv_bfloat16>(problem",
    "launch_wgmma_tile<T, 256, Weights>": "launch_wgmma_tile<T, 128, Weights>",
}
"""Leaves the kernels that the test runs, because compiling takes most of its time."""


def check_planted(tested: cuda_host.Library, case: int) -> None:
    problem, splits = PLANTED_IN[case]
    for order, seed in (("random", 1), ("random", 2), ("forward", 1)):
        result = run("plain", problem, splits, seed, order, tested)
        assert_within(result, problem.expected(rounded=True), str(problem))


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "linear_nf4_wgmma", FAULTS, check_planted, FEW_KERNELS, ["wgmma_weights.cuh", "wgmma_stages.cuh", "split_sums.cuh"]
)


IN_A_TILE_OF_64 = FEW_KERNELS | {"launch_wgmma_tile<T, 128, Weights>": "launch_wgmma_tile<T, 64, Weights>"}


@pytest.mark.parametrize(
    ("mode", "right", "wrong", "report"),
    [
        ("tsan", "__syncwarp();", "", "data race"),
        ("tsan", "__syncthreads();  // all warps have left the tile", "", "data race"),
        ("asan", LAST_ROW, LAST_ROW.replace("min(", "(").replace(", p.N - 1)", ")"), "AddressSanitizer"),
    ],
    ids=["the lanes of a warp", "the tile of lora_left", "rows past the end"],
)
def test_planted_fault_is_reported(mode: str, right: str, wrong: str, report: str, tmp_path: Path) -> None:
    """Missing barriers, and a read past the end, which sanitizers see."""
    path = source("linear_nf4_wgmma")[0]
    for file in (path, path.with_name("wgmma_weights.cuh")):
        text = file.read_text()
        for old, new in (*IN_A_TILE_OF_64.items(), (right, wrong)):
            text = text.replace(old, new)
        (tmp_path / file.name).write_text(text)
    assert sum(right in file.read_text() for file in (path, path.with_name("wgmma_weights.cuh"))) == 1
    tested = cuda_host.build([tmp_path / path.name], mode, include=[path.parent])
    try:
        with pytest.raises(cuda_host.SanitizerReport, match=report):
            run(mode, LinearProblem(1, 8, LONG, dtype=BF16, r=200), tested=tested)
    finally:
        tested.close()


@pytest.mark.parametrize(
    ("M", "N", "K", "expected"),
    [
        (64, 4096, 4096, 4),  # 32 blocks for 132 multiprocessors
        (64, 4096, 1024, 2),  # a part is two fillings of the pipeline at least
        (1, 128, 64, 1),
        (1024, 4096, 4096, 1),
    ],
)
def test_split_count_fills_gpu(M: int, N: int, K: int, expected: int) -> None:
    assert library("linear_nf4_wgmma", "plain").call("linear_nf4_wgmma_splits", M, N, K, 132) == expected


@pytest.mark.parametrize(
    "change", [{"K": 96}, {"N": 12, "transposed": True}, {"r": 4}, {"dtype": torch.float32}, {"blocksize": 32}], ids=str
)
def test_unsupported_problems_are_refused(change: dict) -> None:  # type: ignore[type-arg]
    problem = replace(LinearProblem(2, 16, 64, dtype=BF16), **change)
    arguments = problem.gemm_args(problem.poisoned_y())
    assert library("linear_nf4_wgmma", "plain").call("launch_linear_nf4_wgmma", arguments, None) == 1


def test_errors_of_the_driver_are_returned() -> None:
    """Of the function that is not found, and of the map that cannot be encoded."""
    problem, tested = LinearProblem(2, 16, 64, dtype=BF16), library("linear_nf4_wgmma", "plain")
    for call, error in (("cudaGetDriverEntryPointByVersion", 500), ("cuTensorMapEncodeTiled", 1)):
        tested.fail(call, error)
        arguments = problem.gemm_args(problem.poisoned_y())
        assert tested.call("launch_linear_nf4_wgmma", arguments, None) == error
