"""csrc/cuda/linear_nf4_pairs.cu against float64 (class 2), under the emulator, with its rounding and bank conflicts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_kernels.backends.cuda import routing
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
    LinearProblem(17, 35, 3 * GROUP, dtype=BF16, r=8, bias=torch.float32),
    LinearProblem(22, 300, 2 * GROUP, dtype=BF16, double=False, bias=BF16),
    LinearProblem(24, 5, LONG, dtype=BF16, r=16),
    LinearProblem(43, 66, 2 * GROUP, dtype=BF16, r=8, double=False),
    LinearProblem(48, 37, 4 * GROUP, dtype=BF16, r=24),
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


def first_rows(whole: LinearProblem, M: int) -> LinearProblem:
    """Return the problem of the first M rows of x."""
    part = replace(whole, M=M)
    rows = {name: whole.tensors[name][:M].contiguous() for name in ("x", "s")}
    part.__dict__["tensors"] = whole.tensors | rows
    return part


def cancelled(problem: LinearProblem) -> LinearProblem:
    """Return the problem with equal rows of x, and a bias that leaves of y what the fp32 sums are rounded by."""
    repeated = replace(problem, bias=torch.float32)
    rows = {name: problem.tensors[name][:1].repeat(problem.M, 1) for name in ("x", "s")}
    repeated.__dict__["tensors"] = problem.tensors | rows | {"bias": torch.zeros(problem.N)}
    repeated.tensors["bias"] -= repeated.expected_of_pairs().value[0].float()
    return repeated


def check_order_of_sums(whole: LinearProblem, counts: Iterable[int], tested: cuda_host.Library | None = None) -> None:
    """Require the same bits of the first rows in every batch, `counts`, and of all rows where those of x are equal."""
    residues = cancelled(whole)
    y, left = (run("plain", problem, tested=tested) for problem in (whole, residues))
    assert same_bits(left, left[:1].repeat(whole.M, 1))
    for M in counts:
        assert same_bits(run("plain", first_rows(whole, M), tested=tested), y[:M]), M
        assert same_bits(run("plain", first_rows(residues, M), tested=tested), left[:M]), M


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    ends_of_tiles = (1, 7, 8, 9, 16, 17, 23, 24, 25, 32, 33, 40, 47, 48, 49, 63)
    check_order_of_sums(LinearProblem(64, 37, 6 * GROUP, dtype=BF16, r=8, bias=torch.float32), ends_of_tiles)


@all_modes
def test_every_number_of_rows_in_tiles_of_24(mode: str) -> None:
    whole = LinearProblem(48, 37, 2 * GROUP, dtype=BF16, r=8, bias=torch.float32)
    y = run(mode, whole)
    assert_within(y, whole.expected_of_pairs(), str(whole))
    for M in (*range(17, 25), *range(33, 48)):
        assert same_bits(run(mode, first_rows(whole, M)), y[:M]), M


@pytest.mark.parametrize("M", range(1, 65))
def test_tile_is_the_one_in_the_plan(M: int) -> None:
    tile = library("linear_nf4_pairs", "plain").call("linear_nf4_pairs_tile", M)
    assert tile == routing.pairs_tile(M)["block_m"]
    assert tile == (24 if 17 <= M <= 24 or 33 <= M <= 48 else 8 if M <= 8 else 16 if M <= 16 else 32)


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
@pytest.mark.parametrize("problem", [PROBLEMS[3], *(replace(PROBLEMS[2], M=M) for M in (3, 19, 46))], ids=str)
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
@pytest.mark.parametrize(("rows", "blocks"), [(3, 1), (17, 1), (24, 1), (31, 1), (48, 2), (64, 2)])
def test_the_only_bank_conflicts_of_double_quantization_are_in_the_table_of_absmax_q(rows: int, blocks: int) -> None:
    """In tiles of 8, 24 and 32 rows; from 33 rows on two thread blocks share them."""
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
    "launch_pairs_tile<24, DOUBLE>": "launch_pairs_tile<8, DOUBLE>",
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


FEW_ROWS, LONG_FEW, MANY_ROWS, TWO_TILES_OF_24 = PROBLEMS[1], PROBLEMS[0], PROBLEMS[5], PROBLEMS[4]
PLANTED_IN = (FEW_ROWS, LONG_FEW, MANY_ROWS, TWO_TILES_OF_24)
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
    Fault("the rows that a tile of 24 stores", "min(M_TILE, p.M - m0)", "M_TILE - 8", 3),
    Fault("the grid of two tiles", "ceil_div(problem.M, M_TILE)", "ceil_div(problem.M, kPairsMostTile * 2)", 3),
    Fault(
        "the sums of tiles of 24",
        "((group * p.warps_per_row + other) * M_TILE + m)",
        "((group * p.warps_per_row + other) * kPairsMostTile + m)",
        3,
    ),
    Fault(
        "the x of the third 8 rows",
        "static_cast<const T*>(p.x) + int64_t(m) * p.K",
        "static_cast<const T*>(p.x) + int64_t(min(m0 + tile % 2 * 8 + g, p.M - 1)) * p.K",
        3,
    ),
    Fault(
        "the s of the third 8 rows",
        "load(p.s, min(m0 + tile * 8 + g, p.M - 1))",
        "load(p.s, min(m0 + tile % 2 * 8 + g, p.M - 1))",
        3,
    ),
    Fault(
        "the warps that share rows of w, by the rows of x",
        "pairs_warps_per_row(w.N, w.K, args->multiprocessors)",
        "(args->M > 8 ? 1 : pairs_warps_per_row(w.N, w.K, args->multiprocessors))",
        3,
    ),
    Fault("the bias", "p.bias.data && n + k < p.N", "false", 0),
]
"""Faults in an expression; case: the problem in PLANTED_IN whose result is wrong."""


THREE_KERNELS = {
    "launch_pairs_tile<16, DOUBLE>": "launch_pairs_tile<8, DOUBLE>",
    "launch_pairs<false>": "launch_pairs<true>",
}


def check_planted(tested: cuda_host.Library, case: int) -> None:
    problem = PLANTED_IN[case]
    assert_within(run("plain", problem, tested=tested), problem.expected_of_pairs(), str(problem))
    if problem is TWO_TILES_OF_24:
        check_order_of_sums(problem, (8, 24), tested)


planted, test_checks_pass_without_a_fault, test_wrong_expression_is_detected = planted_tests(
    "linear_nf4_pairs", EXPRESSIONS, check_planted, THREE_KERNELS
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
