"""csrc/cuda/dequantize_nf4.cu in the emulator: bit-equal to the reference (class 1)."""

import pytest
import torch

from qlora_kernels.format import reference
from tests.support import cuda_host

from .launch_args import dequantize_args, nf4_weight, rows_memory
from .launching import (
    FLOAT_TYPES,
    all_modes,
    library,
    needs_emulator,
    needs_nvcc,
    over_schedules,
    poisoned,
    ptx_under_sanitizers,
    quantized,
    same_bits,
)
from .planted import Fault, planted_tests

pytestmark = needs_emulator

TILE = 8192
CASES = [
    # (weights, blocksize, double quantization): whole tiles, tails, odd counts, blocks as long as half a tile
    (1, 64, True),
    (2 * TILE, 64, True),
    (TILE + 33, 32, False),
    (3 * TILE - 1, 64, True),
    (TILE + 4096 + 7, 4096, True),
    (641, 128, False),
]


@all_modes
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(("n", "blocksize", "double"), CASES)
def test_equals_reference(mode: str, n: int, blocksize: int, double: bool, dtype: torch.dtype) -> None:
    w = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.1
    packed, constants, absmax = quantized(w, blocksize, double)

    def run(order: str, seed: int) -> tuple[torch.Tensor]:
        result = poisoned(n, dtype=dtype)
        arguments = dequantize_args(nf4_weight(packed, constants, blocksize, 1, n), result, dtype)
        tested = library("dequantize_nf4", mode)
        tested.calls()
        assert tested.call("launch_dequantize_nf4", arguments, None, seed=seed, order=order) == 0
        assert len(tested.calls()) == (n >= TILE) + (n % TILE > 0), "one launch, and one for what whole tiles leave"
        return (result,)

    (result,) = over_schedules(mode, run)
    assert same_bits(result, reference.dequantize_nf4(packed, absmax, blocksize, torch.Size((n,)), dtype))


ROWS = [
    # (N, K, gap, blocksize): rows longer than a step of a block, equal to one, and shorter; blocks that straddle rows;
    # a gap that moves rows off their alignment
    (5, 4096, 16, 64),
    (20, 1024, 16, 64),
    (600, 40, 32, 64),
    (3, 2104, 8, 4096),
    (17, 1000, 16, 32),
    (5, 64, 3, 64),
]


@all_modes
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "gap", "blocksize"), ROWS)
def test_rows_with_a_stride(mode: str, N: int, K: int, gap: int, blocksize: int, dtype: torch.dtype) -> None:
    check_rows(library("dequantize_nf4", mode), (N, K, gap, blocksize), dtype, mode)


def check_rows(tested: cuda_host.Library, case: tuple[int, int, int, int], dtype: torch.dtype, mode: str = "") -> None:
    """The same values, and what lies between the rows is not written. mode: "plain" runs every schedule."""
    N, K, gap, blocksize = case
    w = torch.randn(N * K, generator=torch.Generator().manual_seed(K)) * 0.1
    packed, constants, absmax = quantized(w, blocksize, True)
    before = poisoned(N, K + gap, dtype=dtype)

    def run(order: str, seed: int) -> tuple[torch.Tensor]:
        result = before.clone()
        memory, stride = rows_memory(result[:, :K])
        arguments = dequantize_args(nf4_weight(packed, constants, blocksize, N, K), memory, dtype, stride)
        assert tested.call("launch_dequantize_nf4", arguments, None, seed=seed, order=order) == 0
        return (result,)

    (result,) = over_schedules(mode, run)
    expected = reference.dequantize_nf4(packed, absmax, blocksize, torch.Size((N, K)), dtype)
    assert same_bits(result[:, :K].contiguous(), expected)
    assert same_bits(result[:, K:].contiguous(), before[:, K:].contiguous())


FAULTS = [
    Fault("the gaps of the rows before", "eights + row * walk.gap", "eights", 2),
    Fault("the end of a row", "column >= walk.columns", "column > walk.columns", 0),
    Fault("the columns of a step", "kStep % K", "int64_t(0)", 0),
    Fault("the gaps of a step", "kStep / K * gap", "int64_t(0)", 2),
    Fault("the constants of a step", "kStep >> shift", "0", 0),
    Fault("the gaps of the weights left over", "i / weight.K * gap", "int64_t(0)", 5),
    Fault("the block of a weight left over", "i >> weight.block_shift", "int64_t(0)", 5),
    Fault("the last weight", "i >= numel", "i > numel", 5),
]
"""Faults in the kernels that write rows with a stride; case: in ROWS."""


ONE_DTYPE = {"launch_dequantize<T>(*args": "launch_dequantize<__nv_bfloat16>(*args"}
"""Leaves the kernels that the test runs, because compiling takes most of its time."""


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "dequantize_nf4", FAULTS, lambda tested, case: check_rows(tested, ROWS[case], torch.bfloat16), ONE_DTYPE
)


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    test_equals_reference(mode, *CASES[4], torch.bfloat16)
    test_rows_with_a_stride(mode, *ROWS[4], torch.bfloat16)


def test_empty_input_launches_nothing() -> None:
    tested = library("dequantize_nf4", "plain")
    tested.calls()
    nothing = nf4_weight(None, (None, None, None, None), 64, 1, 0)
    assert tested.call("launch_dequantize_nf4", dequantize_args(nothing, None, torch.float32), None) == 0
    assert tested.calls() == []


def test_unknown_type_and_failed_launch_are_returned() -> None:
    tested, w = library("dequantize_nf4", "plain"), torch.zeros(64)
    packed, constants, _ = quantized(w, 64, False)
    weight = nf4_weight(packed, constants, 64, 1, 64)
    assert tested.call("launch_dequantize_nf4", dequantize_args(weight, w, 7), None) == 1
    tested.fail("launch", 98)
    assert tested.call("launch_dequantize_nf4", dequantize_args(weight, w, torch.float32), None) == 98
