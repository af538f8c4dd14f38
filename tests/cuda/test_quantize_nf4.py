"""csrc/cuda/quantize_nf4.cu: bytes equal to the reference (class 1), and both levels in two launches."""

import pytest
import torch
from torch import Tensor

from qlora_kernels.format import double_quant, nf4, reference
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

pytestmark = needs_emulator

CASES = [(1, 64), (64 * 5, 64), (2048 + 31, 32), (4096 * 3 + 17, 4096), (2048 * 2, 128), (1500, 1024), (777, 256)]


def blocks_of(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def quantize(mode: str, w: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (packed, absmax, partial sums) of the launcher."""
    n = w.numel()
    tested = library("quantize_nf4", mode)
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
    w = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.05).to(dtype)
    packed, absmax, _ = quantize(mode, w, blocksize)
    expected_packed, expected_absmax = reference.quantize_nf4(w, blocksize)
    assert same_bits(packed, expected_packed)
    assert same_bits(absmax, expected_absmax)


@source_and_ptx
def test_boundaries_zeros_and_extremes(mode: str) -> None:
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
    w = torch.cat(blocks)
    packed, absmax, _ = quantize(mode, w, 64)
    expected_packed, expected_absmax = reference.quantize_nf4(w, 64)
    assert same_bits(packed, expected_packed)
    assert same_bits(absmax, expected_absmax)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_block_with_inf_or_nan_has_nonfinite_absmax(bad: float) -> None:
    w = torch.randn(256)
    w[70] = bad
    _, absmax, _ = quantize("plain", w, 64)
    assert absmax.isfinite().tolist() == [True, False, True, True]


def quantize_absmax(mode: str, absmax: Tensor, partial_sums: Tensor) -> tuple[Tensor, ...]:
    n = absmax.numel()
    tested = library("quantize_nf4", mode)

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
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) * 0.2
    tested = library("quantize_nf4", mode)
    partial_sums = poisoned(tested.call("sum_absmax_partial_sums", n), dtype=torch.float64)
    assert tested.call("launch_sum_absmax", absmax, out(partial_sums), n, None) == 0
    q, scale, offset = quantize_absmax(mode, absmax, partial_sums)
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
