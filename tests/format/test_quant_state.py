"""QuantState validates its fields and computes sizes correctly."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.format import nf4
from qlora_kernels.format.double_quant import dynamic_map
from tests.support.problems import gaussian


def test_bytes_and_bits_of_a_weight():
    _, plain = qk.quantize_nf4(gaussian(1024, 1024), double_quant=False)
    _, nested = qk.quantize_nf4(gaussian(1024, 1024))
    assert plain.bits_per_param == 4.5
    assert nested.nbytes == 1024 * 1024 // 2 + 16384 + 4 * 64 + 4
    assert nested.bits_per_param == pytest.approx(4.127, abs=1e-3)


def test_absmax_is_decoded_on_request():
    w = gaussian(100, 64)
    _, plain = qk.quantize_nf4(w, double_quant=False)
    _, nested = qk.quantize_nf4(w)
    assert plain.absmax_q is None
    assert plain.absmax_code is None
    assert torch.equal(nested.absmax_code, dynamic_map())
    assert nested.absmax.dtype == torch.float32
    # Steps of the map are at most 1.4 % of the scale; the scale is the largest deviation from the mean.
    assert (nested.absmax - plain.absmax).abs().max() <= 0.008 * (plain.absmax - plain.absmax.mean()).abs().max()


def test_refuses_inconsistent_fields():
    shape, dtype = torch.Size((4, 64)), torch.float32
    with pytest.raises(ValueError, match=r"QuantState: either absmax or all of"):
        qk.QuantState(shape, dtype, 64)
    with pytest.raises(ValueError, match=r"QuantState: absmax excludes"):
        qk.QuantState(shape, dtype, 64, torch.ones(4), absmax_offset=torch.zeros(()))
    with pytest.raises(ValueError, match=r"QuantState: absmax must have 4 elements, got 3"):
        qk.QuantState(shape, dtype, 64, torch.ones(3))
    with pytest.raises(TypeError, match=r"QuantState: absmax must be torch.float32, got torch.float16"):
        qk.QuantState(shape, dtype, 64, torch.ones(4).half())
    with pytest.raises(ValueError, match=r"QuantState: blocksize must be one of"):
        qk.QuantState(shape, dtype, 60, torch.ones(4))
    with pytest.raises(TypeError, match=r"QuantState: dtype must be one of"):
        qk.QuantState(shape, torch.int8, 64, torch.ones(4))


def test_is_immutable():
    _, state = qk.quantize_nf4(gaussian(64))
    with pytest.raises(AttributeError):
        state.blocksize = 32


@pytest.mark.parametrize("numel", [0, 1, 2, 7, 64])
def test_pack_is_undone_by_unpack(numel):
    q = torch.arange(numel, dtype=torch.uint8) % 16
    packed = nf4.pack(q)
    assert packed.numel() == (numel + 1) // 2
    assert torch.equal(nf4.unpack(packed, numel), q)
    if numel % 2:
        assert packed[-1] & 0xF == nf4.ZERO_INDEX


def test_even_elements_in_high_nibble():
    assert nf4.pack(torch.tensor([0xA, 0x3], dtype=torch.uint8)).tolist() == [0xA3]
