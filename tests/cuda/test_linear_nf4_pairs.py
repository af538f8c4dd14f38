"""csrc/cuda/linear_nf4_pairs.cu against float64 (class 2), under the emulator, with its rounding and bank conflicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_kernels.format import nf4
from tests.support import cuda_host
from tests.support.linear_formulas import PAIR_TABLE_ROUNDOFFS
from tests.support.tolerances import assert_within, unit_roundoff

from .launching import (
    all_modes,
    library,
    needs_emulator,
    needs_nvcc,
    ptx_under_sanitizers,
    quantized,
    same_bits,
    source,
)
from .linear_problems import PAIR_SCALE, LinearProblem, pair_codes
from .planted import Fault, planted_tests

pytestmark = needs_emulator

BF16 = torch.bfloat16
GROUP = 256  # k of a group: four blocks, the stages of the pipeline
LONG = 19 * GROUP  # eight warps share a row: two or three groups each, so every stage is refilled

PROBLEMS = [
    LinearProblem(1, 5, LONG, dtype=BF16),
    LinearProblem(3, 37, GROUP, dtype=BF16, r=8, bias=torch.float32),  # no warps share a row
    LinearProblem(
        7, 300, 2 * GROUP, dtype=BF16, r=24, double=False, bias=BF16
    ),  # several thread blocks, two steps of r
    LinearProblem(8, 40, 3 * GROUP, dtype=BF16, double=False),
    LinearProblem(37, 33, 5 * GROUP, dtype=BF16, r=16, bias=torch.float16),
    LinearProblem(64, 72, 2 * GROUP, dtype=BF16, r=40),
]
IN_OTHER_TILES = [
    LinearProblem(13, 35, 3 * GROUP, dtype=BF16, r=8, bias=torch.float32),
    LinearProblem(31, 66, 2 * GROUP, dtype=BF16, r=8, double=False),
]


def run(
    mode: str, problem: LinearProblem, seed: int = 1, order: str = "random", tested: cuda_host.Library | None = None
) -> Tensor:
    y = problem.poisoned_y()
    tested = tested or library("linear_nf4_pairs", mode)
    assert tested.call("launch_linear_nf4_pairs", problem.pairs_args(y), None, seed=seed, order=order) == 0
    return y


@all_modes
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward(mode: str, problem: LinearProblem) -> None:
    assert_within(run(mode, problem), problem.expected_of_pairs(), str(problem))


@pytest.mark.parametrize("problem", IN_OTHER_TILES, ids=str)
def test_other_tiles(problem: LinearProblem) -> None:
    assert_within(run("plain", problem), problem.expected_of_pairs(), str(problem))


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    assert_within(run(mode, PROBLEMS[1]), PROBLEMS[1].expected_of_pairs(), str(PROBLEMS[1]))


@needs_nvcc
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_compiled_and_source_agree_bit_for_bit(problem: LinearProblem) -> None:
    assert same_bits(run("ptx", problem), run("plain", problem))


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[2], PROBLEMS[4]], ids=str)
def test_schedules_agree_bit_for_bit(problem: LinearProblem) -> None:
    first = run("plain", problem)
    for order, seed in (("random", 2), ("random", 3), ("forward", 1), ("reverse", 1)):
        assert same_bits(run("plain", problem, seed, order), first)


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    whole = LinearProblem(64, 37, 6 * GROUP, dtype=BF16, r=8, bias=torch.float32)
    y = run("plain", whole)
    for M in (1, 8, 9, 16, 17, 33):
        part = replace(whole, M=M)
        rows = {name: whole.tensors[name][:M].contiguous() for name in ("x", "s")}
        part.__dict__["tensors"] = whole.tensors | rows
        assert same_bits(run("plain", part), y[:M])


def test_the_codes_error_is_less_than_that_of_rounding_each_weight() -> None:
    """In float64, over Gaussian weights: the mean squared error of the weights of this kernel and of the others."""
    packed, (absmax, *_), _ = quantized(torch.randn(1 << 16, generator=torch.Generator().manual_seed(3)), 64, False)
    assert absmax is not None
    q, scale = nf4.unpack(packed, 1 << 16).long(), absmax.double().repeat_interleave(64)
    exact = nf4.code().double()[q] * scale
    one_rounding = (nf4.code()[q] * scale.float()).bfloat16().double()
    error_of_pairs = (pair_codes()[q] * scale - exact).square().mean().sqrt()
    error_of_one_rounding = (one_rounding - exact).square().mean().sqrt()
    assert error_of_pairs <= 0.5 * error_of_one_rounding
    relative = (pair_codes() / nf4.code().double() - 1).nan_to_num()
    assert relative.abs().max() <= PAIR_TABLE_ROUNDOFFS * unit_roundoff(BF16), "docs/format.md states this bound"
    assert f"kPairScale = {PAIR_SCALE}f;" in source("linear_nf4_pairs")[0].read_text()


def test_its_error_is_no_larger_than_that_of_the_other_tensor_core_kernel() -> None:
    problem = LinearProblem(16, 96, 2048, dtype=BF16)
    exact = problem.tensors["x"].double() @ problem.weight(nf4.code()).T

    def error(y: Tensor) -> float:
        return float((y.double() - exact).square().mean().sqrt())

    other = problem.poisoned_y()
    assert library("linear_nf4_gemm", "plain").call("launch_linear_nf4_gemm", problem.gemm_args(other), None) == 0
    assert error(run("plain", problem)) <= error(other)


@needs_nvcc
@pytest.mark.parametrize("problem", [PROBLEMS[3], replace(PROBLEMS[2], M=3)], ids=str)
def test_no_bank_conflicts(problem: LinearProblem) -> None:
    tested = library("linear_nf4_pairs", "ptx")
    tested.count_banks()
    run("ptx", problem)
    counts = tested.bank_counts()
    tested.count_banks(enabled=False)
    lookups = 32 * -(-problem.N // 32) * problem.K // 64
    assert sum(count.instructions for count in counts) > lookups
    assert [count for count in counts if count.wavefronts > count.needed] == []


@needs_nvcc
@pytest.mark.parametrize(("rows", "blocks"), [(3, 1), (31, 1), (64, 2)])
def test_the_only_bank_conflicts_of_double_quantization_are_in_the_table_of_absmax_q(rows: int, blocks: int) -> None:
    """In tiles of 8 and of 32 rows; from 33 rows on two thread blocks share them."""
    problem = replace(PROBLEMS[1], M=rows)
    tested = library("linear_nf4_pairs", "ptx")
    tested.count_banks()
    run("ptx", problem)
    counts = tested.bank_counts()
    tested.count_banks(enabled=False)
    warps, groups = 8 * blocks, 1
    conflicts = [count for count in counts if count.wavefronts > count.needed]
    # In a lane, four lookups for each group of its row; a warp decodes its last group once more, in vain.
    assert 0 < sum(count.instructions for count in conflicts) <= warps * 4 * (groups + 1)
    assert all(count.needed == count.instructions for count in conflicts), "4-byte accesses"


RACE, WRONG = "data race", "not within its bound"
FAULTS = {
    "the wait for the copies": ("cp_async_wait<kPairsStages - 2>();", "cp_async_wait<kPairsStages - 1>();", RACE),
    "the barrier of a stage": ("__syncwarp();  // every", "// every", RACE),
    "the barrier before the sums": ("__syncthreads();\n    float4* const", "float4* const", RACE),
    "the barrier after the tables": (
        "__syncthreads();\n\n    const char* const table",
        "const char* const table",
        RACE,
    ),
    "the buffer of constants": ("store_constants(buffer ^ 1, raw)", "store_constants(buffer, raw)", RACE),
    "the order of rows of w": ("a[row / 2][s][row % 2] = ", "a[row % 2][s][row / 2] = ", WRONG),
}
"""Planted faults: (source text, replacement, what the emulator with ThreadSanitizer reports)."""

ONE_KERNEL = {
    "launch_pairs_tile<16, DOUBLE>": "launch_pairs_tile<8, DOUBLE>",
    "launch_pairs_tile<kPairsMostTile, DOUBLE>": "launch_pairs_tile<8, DOUBLE>",
    "launch_pairs<false>": "launch_pairs<true>",
}
"""Leaves only the kernel that the test runs, because compiling takes most of its time."""


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_detected(fault: str, tmp_path: Path) -> None:
    right, wrong, report = FAULTS[fault]
    path = source("linear_nf4_pairs")[0]
    text = path.read_text()
    for old, new in (*ONE_KERNEL.items(), (right, wrong)):
        assert old in text, f"bring the test up to date: {old}"
        text = text.replace(old, new)
    mutated = tmp_path / path.name
    mutated.write_text(text)
    tested = cuda_host.build([mutated], "tsan", include=[path.parent])
    problem = PROBLEMS[0]
    try:
        y = run("tsan", problem, tested=tested)
        expected = problem.expected_of_pairs()
        found = "" if ((y.double() - expected.value).abs() <= expected.error).all() else WRONG
    except cuda_host.SanitizerReport as raised:
        found = str(raised)
    finally:
        tested.close()
    assert report in found


FEW_ROWS, LONG_FEW, MANY_ROWS = PROBLEMS[1], PROBLEMS[0], PROBLEMS[5]
PLANTED_IN = (FEW_ROWS, LONG_FEW, MANY_ROWS)
EXPRESSIONS = [
    Fault("the x of the next stage", "load_x(tile, j + 1)", "load_x(tile, j)", 2),
    Fault("the second thread block's rows of x", "int(blockIdx.y) * M_TILE", "0 * M_TILE", 2),
    Fault("the absmax of a row", "scale[i / 2]", "scale[i / 4]", 0),
    Fault("the scale of the codes", "1.0f / kPairScale", "1.0f", 0),
    Fault("the last step of the rank", "j - t * 4 < p.r", "j - t * 4 + 16 < p.r", 2),
    Fault("the row of lora_B", "row_of_w(4 * g + row)", "row_of_w(4 * g)", 0),
    Fault("the constants of later groups", "left > 2 * kGroupBlocks", "false", 1),
    Fault("the warp's first group", "groups * part / p.warps_per_row", "groups * 0", 1),
    Fault("the sums of the other warps", "other < p.warps_per_row", "other < 1", 1),
    Fault("the place of a sum", "(chunk ^ (m & 7))", "chunk", 2),
    Fault("the bias", "p.bias.data && n + k < p.N", "false", 0),
]
"""Faults in an expression; case: the problem in PLANTED_IN whose result is wrong."""


TWO_KERNELS = {
    "launch_pairs_tile<16, DOUBLE>": "launch_pairs_tile<8, DOUBLE>",
    "launch_pairs<false>": "launch_pairs<true>",
}


def check_planted(tested: cuda_host.Library, case: int) -> None:
    problem = PLANTED_IN[case]
    assert_within(run("plain", problem, tested=tested), problem.expected_of_pairs(), str(problem))


planted, test_checks_pass_without_a_fault, test_wrong_expression_is_detected = planted_tests(
    "linear_nf4_pairs", EXPRESSIONS, check_planted, TWO_KERNELS
)


@pytest.mark.parametrize(
    ("N", "K", "multiprocessors", "expected"),
    [(4096, 4096, 132, 8), (14336, 4096, 132, 4), (64, 256, 132, 1), (64, 512, 132, 2), (4096, 4096, 4, 1)],
)
def test_warps_share_rows_where_rows_do_not_fill_the_gpu(N: int, K: int, multiprocessors: int, expected: int) -> None:
    tested = library("linear_nf4_pairs", "plain")
    assert tested.call("linear_nf4_pairs_warps_per_row", N, K, multiprocessors) == expected


@pytest.mark.parametrize("change", [{"M": 65}, {"K": 320}, {"r": 4}, {"blocksize": 128}, {"blocksize": 32}], ids=str)
def test_unsupported_problems_are_refused(change: dict) -> None:  # type: ignore[type-arg]
    problem = replace(LinearProblem(2, 16, 256, dtype=BF16), **change)
    arguments = problem.pairs_args(problem.poisoned_y())
    assert library("linear_nf4_pairs", "plain").call("launch_linear_nf4_pairs", arguments, None) == 1
