"""The codec's sm_80 PTX, executed on the host, equals the reference bit for bit, including the shuffle tables."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.triton.dequantize_nf4 import dequantize_nf4
from qlora_kernels.backends.triton.quantize_absmax import quantize_absmax
from qlora_kernels.backends.triton.quantize_nf4 import quantize_nf4
from qlora_kernels.format import double_quant, nf4, reference
from qlora_kernels.ops.operands import Weight
from tests.support.problems import gaussian
from tests.support.triton_on_host import executing_ptx


@pytest.mark.parametrize(
    ("dtype", "double_quant_on", "numel", "blocksize"),
    [
        (torch.bfloat16, True, 20003, 64),
        (torch.float16, False, 20003, 64),
        (torch.float32, True, 8192, 32),
    ],
    ids=str,
)
def test_dequantize(dtype, double_quant_on, numel, blocksize):
    packed, absmax = reference.quantize_nf4(gaussian(numel), blocksize)
    constants = (absmax, None, None, None)
    if double_quant_on:
        constants = (None, *double_quant.quantize_absmax(absmax))
        absmax = double_quant.dequantize_absmax(*constants[1:])
    out = torch.full((numel,), torch.nan, dtype=dtype)
    with executing_ptx():
        dequantize_nf4(Weight(packed, *constants, blocksize, 1, numel), out=out)
    assert torch.equal(out, reference.dequantize_nf4(packed, absmax, blocksize, out.shape, dtype))


def test_quantize():
    w = gaussian(9001, dtype=torch.bfloat16)
    w[64:128] = 0.0
    expected_packed, expected_absmax = reference.quantize_nf4(w, 64)
    with executing_ptx():
        packed, absmax = quantize_nf4(w, blocksize=64)
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(packed, expected_packed)


def test_quantize_at_boundaries():
    """Each boundary, its two neighbours, and the cells' edges, in blocks whose absmax is one."""
    boundaries = nf4.boundaries()
    edges = torch.tensor([(cell - 15.5) / 15.0 for cell in range(1, 31)], dtype=torch.float32)
    points = torch.cat([boundaries, edges, torch.tensor([1.0, -1.0, 0.0, -0.0])])
    points = torch.cat([points, torch.nextafter(points, points + 1), torch.nextafter(points, points - 1)]).clamp(-1, 1)
    w = torch.zeros(-(-points.numel() // 63) * 64).view(-1, 64)
    w[:, 0] = 1.0
    w[:, 1:].view(-1, 63).copy_(torch.nn.functional.pad(points, (0, w.shape[0] * 63 - points.numel())).view(-1, 63))
    expected_packed, _ = reference.quantize_nf4(w, 64)
    with executing_ptx():
        packed, _ = quantize_nf4(w, blocksize=64)
    assert torch.equal(packed, expected_packed)


def test_quantize_absmax():
    absmax = gaussian(5000).abs() + 0.1
    with executing_ptx():
        q, scale, offset = quantize_absmax(absmax)
    assert abs(offset.double() - absmax.double().mean()) <= torch.finfo(torch.float32).eps * absmax.double().mean()
    for actual, expected in zip((q, scale), double_quant.quantize_absmax(absmax, offset), strict=False):
        assert torch.equal(actual, expected)
