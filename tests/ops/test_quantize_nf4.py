"""Class 1 (codec): packed bytes and constants equal the reference's bit for bit, in every backend and dtype."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.format import double_quant, nf4, reference
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends

SIZES = (0, 1, 2, 31, 64, 65, 4096, 4099, 20000)
backends = pytest.mark.parametrize("backend", usable_backends("quantize_nf4"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@backends
@dtypes
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_matches_reference(backend, dtype, numel, blocksize):
    w = gaussian(numel, dtype=dtype)
    packed, absmax = reference.quantize_nf4(w, blocksize)
    with qk.use_backend(backend):
        actual_packed, state = qk.quantize_nf4(w, blocksize, double_quant=False)
    assert torch.equal(actual_packed.reshape(-1), packed)
    assert torch.equal(state.absmax, absmax)


@backends
@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 5000])
def test_double_quantization_matches_reference(backend, numel):
    absmax = gaussian(numel).abs() + 0.1
    with qk.use_backend(backend):
        actual = torch.ops.qlora_kernels.quantize_absmax(absmax)
    if backend in ("reference", "cpu"):
        expected = double_quant.quantize_absmax(absmax)
    else:
        # A GPU sums in another order: the mean is within one ulp of fp64's, and all else is exact for it.
        mean = absmax.double().mean().nan_to_num()
        assert abs(actual[2].double() - mean) <= torch.finfo(torch.float32).eps * mean
        expected = double_quant.quantize_absmax(absmax, actual[2])
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@backends
@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_decision_boundaries(backend, ulps):
    """At each boundary and one ulp beside it; the block's absmax is 1, so that w is the normalized value."""
    w = torch.zeros(64)
    boundaries = nf4.boundaries()
    moved = boundaries if ulps == 0 else torch.nextafter(boundaries, torch.full((15,), ulps * torch.inf))
    w[:15], w[63] = moved, 1.0
    with qk.use_backend(backend):
        packed, _ = qk.quantize_nf4(w)
    expected = torch.arange(15) + (ulps > 0)
    assert nf4.unpack(packed, 64)[:15].tolist() == expected.tolist()


@backends
def test_absmax_code_boundaries(backend):
    """The 8-bit rule is exact at each midpoint and its two neighbours, in a block whose scale is one.

    Values are paired as +v, -v, so that the mean is 0.
    """
    middles = double_quant.dynamic_boundaries()
    for ulps in (-1, 0, 1):
        moved = middles if ulps == 0 else torch.nextafter(middles, torch.full((255,), ulps * torch.inf))
        for half in (moved[:127], moved[127:254], moved[254:]):
            absmax = torch.cat([half, -half, torch.tensor([1.0, -1.0])])
            absmax = torch.cat([absmax, torch.zeros(256 - absmax.numel())])
            with qk.use_backend(backend):
                q, scale, offset = torch.ops.qlora_kernels.quantize_absmax(absmax)
            expected = torch.bucketize((absmax - offset) * (1 / scale), middles).to(torch.uint8)
            assert torch.equal(q, expected)


@backends
@dtypes
def test_zero_and_tiny_blocks(backend, dtype):
    w = torch.zeros(200, dtype=dtype)
    w[64:128] = 2.0**-127 if dtype != torch.float16 else 0.0
    w[130] = 1.0
    with qk.use_backend(backend):
        packed, state = qk.quantize_nf4(w, double_quant=False)
    assert state.absmax.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert nf4.unpack(packed, 128).eq(nf4.ZERO_INDEX).all()
    assert torch.equal(qk.dequantize_nf4(packed, state)[:128], torch.zeros(128, dtype=dtype))


@backends
def test_constant_absmax_has_zero_scale(backend):
    with qk.use_backend(backend):
        q, scale, offset = torch.ops.qlora_kernels.quantize_absmax(torch.full((300,), 0.25))
    assert scale.tolist() == [0.0, 0.0]
    assert q.eq(127).all()
    assert offset.item() == 0.25


@backends
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [0, 63, 64, 99])
def test_nonfinite(backend, bad, where):
    w = gaussian(100)
    w[where] = bad
    with qk.use_backend(backend):
        with pytest.raises(ValueError, match=r"quantize_nf4: w must be finite, got inf or NaN in 1 of 2 blocks"):
            qk.quantize_nf4(w)
        packed, state = qk.quantize_nf4(w, nonfinite="zero")
    clean = w.clone()
    clean[where] = 0.0
    assert torch.equal(packed, qk.quantize_nf4(clean)[0])
    assert torch.isfinite(qk.dequantize_nf4(packed, state)).all()


@backends
@pytest.mark.parametrize("size", [256, 1280])
@pytest.mark.parametrize("value", [3e38, torch.finfo(torch.float32).max])
def test_weights_with_overflowing_constants_are_refused(backend, size, value):
    """The mean of their absmax overflows in fp32 on some backends: all refuse it, and one level is right."""
    w = torch.full((size,), value)
    w[size // 2 :] = 1.0
    with qk.use_backend(backend):
        for nonfinite in ("raise", "zero"):
            with pytest.raises(ValueError, match=r"w must be small enough .* pass double_quant=False"):
                qk.quantize_nf4(w, nonfinite=nonfinite)
        assert torch.equal(qk.dequantize_nf4(*qk.quantize_nf4(w, double_quant=False)), w)
        assert qk.dequantize_nf4(*qk.quantize_nf4(torch.full((size,), 3e37 / size * 64))).isfinite().all()


@backends
def test_noncontiguous_equals_contiguous(backend):
    w = gaussian(37, 50).T
    with qk.use_backend(backend):
        packed, state = qk.quantize_nf4(w)
        same, same_state = qk.quantize_nf4(w.contiguous())
    assert torch.equal(packed, same)
    assert torch.equal(state.absmax, same_state.absmax)
    assert state.shape == (50, 37)


def test_refuses_bad_arguments():
    with pytest.raises(TypeError, match=r"quantize_nf4: w must be float32, bfloat16 or float16, got torch.float64"):
        qk.quantize_nf4(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"quantize_nf4: blocksize must be one of .*, got 48"):
        qk.quantize_nf4(torch.zeros(4), blocksize=48)
    for blocksize in ("64", 64.0, None):
        with pytest.raises(TypeError, match=rf"quantize_nf4: blocksize must be an int, got {blocksize!r}"):
            qk.quantize_nf4(torch.zeros(4), blocksize=blocksize)
    for w in ([1.0], None):
        with pytest.raises(TypeError, match=rf"quantize_nf4: w must be a tensor, got {type(w).__name__}"):
            qk.quantize_nf4(w)
    with pytest.raises(ValueError, match=r'nonfinite must be "raise" or "zero"'):
        qk.quantize_nf4(torch.zeros(4), nonfinite="maybe")


@backends
def test_opcheck(backend):
    with qk.use_backend(backend):
        torch.library.opcheck(torch.ops.qlora_kernels.quantize_nf4, (gaussian(100),), {"blocksize": 64})
        torch.library.opcheck(torch.ops.qlora_kernels.quantize_absmax, (gaussian(100),))
        torch.library.opcheck(torch.ops.qlora_kernels.quantize_nf4_double, (gaussian(100),), {"blocksize": 64})


@backends
def test_the_largest_finite_weights_are_finite(backend):
    """Their magnitudes sum to infinity."""
    w = torch.full((256,), torch.finfo(torch.float32).max)
    with qk.use_backend(backend):
        packed, state = qk.quantize_nf4(w, double_quant=False)
    assert torch.equal(qk.dequantize_nf4(packed, state), w)
