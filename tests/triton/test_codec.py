"""Class 1 (codec): quantize, double-quantize and dequantize equal the reference bit for bit, interpreted."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.format import double_quant, nf4, reference
from tests.support.problems import DTYPES, dtype_name, gaussian

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture(autouse=True)
def triton_backend():
    with qk.use_backend("triton"):
        yield


@dtypes
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "dq"])
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [
        ((1,), 64),
        ((33, 97), 64),
        ((128, 128), 64),  # one program, unmasked
        ((257, 64), 32),  # three programs; the last holds one row of each
        ((300, 301), 128),
        ((5, 4099), 4096),
        ((2, 16384), 256),  # two programs, unmasked
    ],
    ids=str,
)
def test_dequantize(dtype, double_quant, shape, blocksize):
    w = gaussian(*shape)
    with qk.use_backend("reference"):
        packed, state = qk.quantize_nf4(w, blocksize, double_quant)
    arena = torch.full((w.numel() + 64,), torch.nan, dtype=dtype)
    out = arena[32:-32].view(shape)
    qk.dequantize_nf4(packed, state, out=out)
    assert torch.equal(out, reference.dequantize_nf4(packed, state.absmax, blocksize, state.shape, dtype))
    assert arena[:32].isnan().all()
    assert arena[-32:].isnan().all()


@dtypes
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("numel", [1, 31, 4096, 4099, 9001])
def test_quantize(dtype, blocksize, numel):
    w = gaussian(numel, dtype=dtype)
    expected_packed, expected_absmax = reference.quantize_nf4(w, blocksize)
    packed, absmax = torch.ops.qlora_kernels.quantize_nf4(w, blocksize=blocksize)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_decision_boundaries(ulps):
    w = torch.zeros(64)
    boundaries = nf4.boundaries()
    w[:15] = boundaries if ulps == 0 else torch.nextafter(boundaries, torch.full((15,), ulps * torch.inf))
    w[63] = 1.0
    packed, _ = qk.quantize_nf4(w)
    assert nf4.unpack(packed, 64)[:15].tolist() == [i + (ulps > 0) for i in range(15)]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_zero_tiny_and_nonfinite_blocks():
    w = torch.zeros(320)
    w[64:128] = 2.0**-127
    w[130] = 1.0
    w[200], w[260] = torch.nan, -torch.inf
    packed, absmax = torch.ops.qlora_kernels.quantize_nf4(w, blocksize=64)
    assert absmax[:3].tolist() == [0.0, 0.0, 1.0]
    assert absmax[3].isnan()
    assert absmax[4].isinf()
    assert nf4.unpack(packed, 128).eq(nf4.ZERO_INDEX).all()


@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000, 64 * 256 + 1])
def test_quantize_absmax(numel):
    absmax = gaussian(numel).abs() + 0.1
    q, scale, offset = torch.ops.qlora_kernels.quantize_absmax(absmax)
    mean = absmax.double().mean()
    assert abs(offset.double() - mean) <= torch.finfo(torch.float32).eps * mean
    centred = torch.zeros(-(-numel // 256) * 256)
    centred[:numel] = absmax - offset
    expected_scale = centred.view(-1, 256).abs().amax(1)
    assert torch.equal(scale, torch.where(expected_scale < nf4.SMALLEST_ABSMAX, 0.0, expected_scale))
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0).repeat_interleave(256)
    expected_q = torch.bucketize(centred * inverse, double_quant.dynamic_boundaries())[:numel]
    assert torch.equal(q, expected_q.to(torch.uint8))


def test_quantize_absmax_boundaries_and_zero_scale():
    """Midpoints and their neighbours, in pairs +v, -v so that the mean is zero, with a 1 so that the scale is one."""
    middles = double_quant.dynamic_boundaries()
    for ulps in (-1, 0, 1):
        moved = middles if ulps == 0 else torch.nextafter(middles, torch.full((255,), ulps * torch.inf))
        absmax = torch.zeros(256)
        absmax[:254] = torch.cat([moved[:127], -moved[:127]])
        absmax[254:] = torch.tensor([1.0, -1.0])
        q, scale, offset = torch.ops.qlora_kernels.quantize_absmax(absmax)
        assert torch.equal(q, torch.bucketize((absmax - offset) * (1 / scale), middles).to(torch.uint8))
    q, scale, offset = torch.ops.qlora_kernels.quantize_absmax(torch.full((300,), 0.25))
    assert scale.tolist() == [0.0, 0.0]
    assert q.eq(127).all()
    assert offset.item() == 0.25
