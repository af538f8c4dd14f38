"""csrc/cuda/quantize_nf4.cu: bytes equal to the reference (class 1), and both levels in two launches."""

import pytest
import torch
from torch import Tensor

from qlora_kernels.format import double_quant, nf4, reference
from tests.support import cuda_host
from tests.support.cuda_host import out

from .launch_args import quantize_absmax_args, quantize_args
from .launching import (
    FLOAT_TYPES,
    SCHEDULES,
    all_modes,
    library,
    needs_emulator,
    needs_nvcc,
    over_schedules,
    poisoned,
    ptx_under_sanitizers,
    same_bits,
    shift,
    source_and_ptx,
)
from .planted import Fault, planted_tests

pytestmark = needs_emulator

CASES = [(1, 64), (64 * 5, 64), (2048 + 31, 32), (4096 * 3 + 17, 4096), (2048 * 2, 128), (1500, 1024), (777, 256)]


def blocks_of(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def quantize(
    mode: str, w: Tensor, blocksize: int, tested: cuda_host.Library | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (packed, absmax, partial sums) of the launcher."""
    n = w.numel()
    tested = tested or library("quantize_nf4", mode)
    sums = tested.call("quantize_nf4_partial_sums", n, shift(blocksize))

    def run(order: str, seed: int) -> tuple[Tensor, ...]:
        packed = torch.full(((n + 1) // 2,), 0xA5, dtype=torch.uint8)
        absmax = poisoned(blocks_of(n, blocksize), dtype=torch.float32)
        partial_sums = poisoned(sums, dtype=torch.float64)
        arguments = quantize_args(w, blocksize, packed, absmax, partial_sums)
        assert tested.call("launch_quantize_nf4", arguments, None, seed=seed, order=order) == 0
        return packed, absmax, partial_sums

    packed, absmax, partial_sums = over_schedules(mode, run)
    return packed, absmax, partial_sums


@all_modes
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(("n", "blocksize"), CASES)
def test_equals_reference(mode: str, n: int, blocksize: int, dtype: torch.dtype) -> None:
    check_first_level(mode, n, blocksize, dtype)


def check_first_level(
    mode: str, n: int, blocksize: int, dtype: torch.dtype, tested: cuda_host.Library | None = None
) -> None:
    w = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.05).to(dtype)
    packed, absmax, _ = quantize(mode, w, blocksize, tested)
    expected_packed, expected_absmax = reference.quantize_nf4(w, blocksize)
    assert same_bits(packed, expected_packed)
    assert same_bits(absmax, expected_absmax)


@source_and_ptx
def test_boundaries_zeros_and_extremes(mode: str) -> None:
    check_extremes(mode)


def check_extremes(mode: str, tested: cuda_host.Library | None = None) -> None:
    """Each boundary one ulp below, on and above it; all-zero, denormal and huge blocks."""
    edges = nf4.boundaries()
    around = torch.stack([edges.nextafter(torch.tensor(-9.0)), edges, edges.nextafter(torch.tensor(9.0))], 1).reshape(
        -1
    )
    blocks = [
        torch.cat([around, torch.tensor([1.0]), torch.zeros(18)]),
        torch.zeros(64),
        torch.full((64,), 2.0**-127),
        torch.linspace(-1, 1, 64) * 3.4e38,
        torch.linspace(-1, 1, 64) * 2.0**-126,
        -torch.ones(64),
    ]
    w = torch.cat([*blocks, beside_boundaries()])
    packed, absmax, _ = quantize(mode, w, 64, tested)
    expected_packed, expected_absmax = reference.quantize_nf4(w, 64)
    assert same_bits(packed, expected_packed)
    assert same_bits(absmax, expected_absmax)


def beside_boundaries() -> Tensor:
    """Return a block in which some products with 1 / absmax lie on the other side of a boundary than the quotients."""
    edges, generator = nf4.boundaries(), torch.Generator().manual_seed(0)
    for _ in range(1000):
        largest = torch.rand((), generator=generator) + 0.5
        on = edges * largest
        near = torch.cat([on, on.nextafter(torch.tensor(-9.0)), on.nextafter(torch.tensor(9.0))])
        by_product = torch.bucketize(near * (1 / largest), edges)
        if not torch.equal(by_product, torch.bucketize(near / largest, edges)):
            return torch.cat([near, largest[None], torch.zeros(63 - near.numel())])
    raise AssertionError("no such block was found")


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_block_with_inf_or_nan_has_nonfinite_absmax(bad: float) -> None:
    w = torch.randn(256)
    w[70] = bad
    _, absmax, _ = quantize("plain", w, 64)
    assert absmax.isfinite().tolist() == [True, False, True, True]


def quantize_absmax(
    mode: str, absmax: Tensor, partial_sums: Tensor, tested: cuda_host.Library | None = None
) -> tuple[Tensor, ...]:
    n = absmax.numel()
    tested = tested or library("quantize_nf4", mode)

    def run(order: str, seed: int) -> tuple[Tensor, ...]:
        q = torch.full((n,), 0xA5, dtype=torch.uint8)
        scale, offset = poisoned(blocks_of(n, 256), dtype=torch.float32), poisoned(1, dtype=torch.float32)
        arguments = quantize_absmax_args(absmax, partial_sums, q, scale, offset)
        assert tested.call("launch_quantize_absmax", arguments, None, seed=seed, order=order) == 0
        return q, scale, offset

    return over_schedules(mode, run)


def expected_second_level(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reference's bytes for the given offset, which is subtracted before so that the mean is not used."""
    n = absmax.numel()
    centred = torch.zeros(blocks_of(n, 256) * 256)
    centred[:n] = absmax - offset
    scale = centred.view(-1, 256).abs().amax(1)
    scale = torch.where(scale < nf4.SMALLEST_ABSMAX, 0.0, scale)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    q = torch.bucketize(centred.view(-1, 256) * inverse[:, None], double_quant.dynamic_boundaries())
    return q.reshape(-1)[:n].to(torch.uint8), scale


@all_modes
@pytest.mark.parametrize("n", [1, 256, 257, 3000])
def test_second_level(mode: str, n: int) -> None:
    check_second_level(mode, n, library("quantize_nf4", mode))


def check_second_level(mode: str, n: int, tested: cuda_host.Library) -> None:
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) * 0.2
    partial_sums = poisoned(tested.call("sum_absmax_partial_sums", n), dtype=torch.float64)
    assert tested.call("launch_sum_absmax", absmax, out(partial_sums), n, None) == 0
    q, scale, offset = quantize_absmax(mode, absmax, partial_sums, tested)
    exact = absmax.double().mean().float()
    assert abs(offset.item() - exact.item()) <= torch.finfo(torch.float32).eps * exact.item()
    expected_q, expected_scale = expected_second_level(absmax, offset)
    assert same_bits(q, expected_q)
    assert same_bits(scale, expected_scale)


@source_and_ptx
def test_both_levels_in_two_launches(mode: str) -> None:
    w = torch.randn(300 * 64 + 5)
    tested = library("quantize_nf4", mode)
    tested.calls()
    _, absmax, partial_sums = quantize(mode, w, 64)
    q, scale, offset = quantize_absmax(mode, absmax, partial_sums)
    schedules = len(SCHEDULES) if mode == "plain" else 1
    assert [call.name for call in tested.calls()] == ["launch"] * 2 * schedules
    expected_q, expected_scale = expected_second_level(absmax, offset)
    assert same_bits(q, expected_q)
    assert same_bits(scale, expected_scale)
    assert abs(offset.item() - absmax.double().mean().item()) <= torch.finfo(torch.float32).eps * offset.item()


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    test_equals_reference(mode, *CASES[2], torch.bfloat16)
    test_second_level(mode, 257)


def test_constants_that_are_all_equal() -> None:
    absmax = torch.full((300,), 0.25)
    tested = library("quantize_nf4", "plain")
    partial_sums = poisoned(tested.call("sum_absmax_partial_sums", 300), dtype=torch.float64)
    tested.call("launch_sum_absmax", absmax, out(partial_sums), 300, None)
    q, scale, offset = quantize_absmax("plain", absmax, partial_sums)
    assert offset.item() == 0.25
    assert (scale == 0).all()
    assert (q == 127).all()


FIRST_LEVEL, SECOND_LEVEL = [*CASES[1:4], CASES[5]], (257, 3000)
EXTREMES, BOTH = 100, 101
FAULTS = [
    Fault("the order of nibbles", "i % 2 ? 0 : 4", "i % 2 ? 4 : 0", 0),
    Fault("the product with 1 / absmax", "__fmul_rn(value[i], inverse)", "value[i] / scale", EXTREMES),
    Fault("a block of zeros", "absmax > 0 ? __frcp_rn(absmax) : 0.0f", "__frcp_rn(absmax)", EXTREMES),
    Fault("the sign bit", "__float_as_uint(value[i]) & 0x7FFFFFFFu", "__float_as_uint(value[i])", 0),
    Fault("the block of an absmax", "mine >> block_shift", "(mine >> block_shift) ^ 1", 0),
    Fault(
        "the end of the weights", "i < count ? to_float(w[mine + i]) : 0.0f", "to_float(w[min(mine + i, numel - 1)])", 1
    ),
    Fault("the last byte", "i < (count + 1) / 2", "i < count / 2", 1),
    Fault("the first warp of a block", "warp / (threads / 32) * (threads / 32)", "0", 3),
    Fault("the warps of a block", "i < threads / 32", "i < 1", 2),
    Fault("the barrier before the next tile", "__syncthreads();  // warp_max is free again", "", 2),
    Fault("the warps of a sum", "i < int(blockDim.x) / 32", "i < 1", BOTH),
    Fault("the next tile of a block", "start += int64_t(gridDim.x) * tile", "start += tile", BOTH),
    Fault("the mean", "sum / static_cast<double>(n_blocks)", "sum / static_cast<double>(n_blocks + 1)", 10),
    Fault("the subtracted mean", "__fsub_rn(absmax[index], offset)", "absmax[index]", 10),
    Fault("the last part of the sum", "i < n_partial_sums", "i < n_partial_sums - 1", 11),
    Fault("the constants of a part", "int64_t(gridDim.x) * kQuantizeThreads", "int64_t(kQuantizeThreads)", 11),
    Fault("the rounding of a constant", "__fmul_rn(centred, reciprocal_or_zero(scale))", "centred", 10),
]
"""case: in FIRST_LEVEL, 10 + in SECOND_LEVEL, or one of the other two."""

ONE_DTYPE_TWO_BLOCKS = {
    "launch_quantize<T>(*args": "launch_quantize<float>(*args",
    "kMaxPartialSums = 1024": "kMaxPartialSums = 2",
}
"""Leaves one kernel, because compiling takes most of its time, and two blocks, so that each has several tiles."""


def check_planted(tested: cuda_host.Library, case: int) -> None:
    if case == EXTREMES:
        check_extremes("plain", tested)
    elif case == BOTH:
        _, absmax, partial_sums = quantize("plain", torch.randn(300 * 64 + 5), 64, tested)
        _, _, offset = quantize_absmax("plain", absmax, partial_sums, tested)
        assert abs(offset.item() - absmax.double().mean().item()) <= torch.finfo(torch.float32).eps * offset.item()
    elif case >= 10:
        check_second_level("plain", SECOND_LEVEL[case - 10], tested)
    else:
        check_first_level("plain", *FIRST_LEVEL[case], torch.float32, tested)


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "quantize_nf4", FAULTS, check_planted, ONE_DTYPE_TWO_BLOCKS
)
