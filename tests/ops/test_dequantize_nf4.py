"""Class 1 (codec): dequantized values equal the reference's bit for bit, in every backend and dtype."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.format import reference
from qlora_kernels.ops.operands import weight_of
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends

backends = pytest.mark.parametrize("backend", usable_backends("dequantize_nf4"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@backends
@dtypes
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((0,), 64), ((1,), 64), ((33, 96), 64), ((17, 31), 32), ((3, 5, 7), 128), ((130, 257), 256), ((70, 1024), 4096)],
)
def test_matches_reference(backend, dtype, double_quant, shape, blocksize):
    packed, state = qk.quantize_nf4(gaussian(*shape), blocksize, double_quant)
    expected = reference.dequantize_nf4(packed, state.absmax, blocksize, state.shape, dtype)
    with qk.use_backend(backend):
        actual = qk.dequantize_nf4(packed, state, dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


@backends
@dtypes
def test_every_byte_at_every_scale(backend, dtype):
    """All 256 bytes under absmax values that round up, down and to even in 16 bits; one block each."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(64)
    absmax = gaussian(512).exp()
    state = qk.QuantState(torch.Size((32768,)), torch.float32, 64, absmax=absmax)
    expected = reference.dequantize_nf4(packed, absmax, 64, state.shape, dtype)
    with qk.use_backend(backend):
        assert torch.equal(qk.dequantize_nf4(packed, state, dtype), expected)


@backends
@dtypes
def test_out_is_filled_without_overrun(backend, dtype):
    packed, state = qk.quantize_nf4(gaussian(33, 97))
    arena = torch.full((33 * 97 + 64,), torch.nan, dtype=dtype)
    out = arena[32 : 32 + 33 * 97].view(33, 97)
    with qk.use_backend(backend):
        assert qk.dequantize_nf4(packed, state, out=out) is out
    assert torch.equal(out, reference.dequantize_nf4(packed, state.absmax, 64, state.shape, dtype))
    assert arena[:32].isnan().all()
    assert arena[32 + 33 * 97 :].isnan().all()


def test_default_dtype_is_source_dtype():
    packed, state = qk.quantize_nf4(gaussian(64, dtype=torch.bfloat16))
    assert qk.dequantize_nf4(packed, state).dtype == torch.bfloat16


def test_refuses_bad_arguments():
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    with pytest.raises(ValueError, match=r"dequantize_nf4: packed must have 256 elements, got 255"):
        qk.dequantize_nf4(packed[:-1], state)
    with pytest.raises(ValueError, match=r"dequantize_nf4: out must have shape \(8, 64\), got \(64, 8\)"):
        qk.dequantize_nf4(packed, state, out=torch.empty(64, 8))
    with pytest.raises(ValueError, match=r"dequantize_nf4: out must be contiguous"):
        qk.dequantize_nf4(packed, state, out=torch.empty(64, 8).T)
    with pytest.raises(TypeError, match=r"dequantize_nf4: dtype must equal out's"):
        qk.dequantize_nf4(packed, state, dtype=torch.float16, out=torch.empty(8, 64))


@backends
@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(backend, double_quant):
    packed, state = qk.quantize_nf4(gaussian(8, 96), double_quant=double_quant)
    with qk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.qlora_kernels.dequantize_nf4.default,
            weight_of("opcheck", packed, state),
            {"dtype": torch.bfloat16},
        )
        torch.library.opcheck(
            torch.ops.qlora_kernels.dequantize_nf4.out,
            weight_of("opcheck", packed, state),
            {"out": torch.zeros(8, 96)},
        )
