"""Class 2 (matmul): forward and gradients against float64, within the bounds of python/numerics/tolerances.py."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import weight_of
from tests.support.linear_formulas import arithmetic_of, linear, linear_grad_x
from tests.support.problems import DTYPES, dtype_name, gaussian, shapes, usable_backends
from tests.support.tolerances import assert_repeats, assert_within, exactly, total

backends = pytest.mark.parametrize("backend", usable_backends("linear_nf4"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["absmax32", "absmax8"])


def weight(shape, double_quant):
    return qk.quantize_nf4(gaussian(shape.N, shape.K, seed=1) / shape.K**0.5, shape.blocksize, double_quant)


@backends
@dtypes
@double_quants
@shapes
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_forward(backend, dtype, double_quant, shape, bias_dtype):
    packed, state = weight(shape, double_quant)
    x = gaussian(shape.M, shape.K, dtype=dtype)
    bias = None if bias_dtype is None else gaussian(shape.N, seed=2, dtype=bias_dtype)
    with qk.use_backend(backend):
        y = qk.linear_nf4(x, packed, state, bias)
    w = qk.dequantize_nf4(packed, state, dtype)
    assert y.dtype == dtype
    assert_within(y, linear(x, w, bias, arithmetic_of(backend, dtype)), "y")


@backends
@dtypes
@double_quants
@shapes
def test_gradients(backend, dtype, double_quant, shape):
    packed, state = weight(shape, double_quant)
    x = gaussian(shape.M, shape.K, dtype=dtype).requires_grad_()
    bias = gaussian(shape.N, seed=2).to(dtype).requires_grad_()
    grad_y = gaussian(shape.M, shape.N, dtype=dtype, seed=3)
    with qk.use_backend(backend):
        qk.linear_nf4(x, packed, state, bias).backward(grad_y)
    w = qk.dequantize_nf4(packed, state, dtype)
    assert_within(x.grad, linear_grad_x(grad_y, w, arithmetic_of(backend, dtype)), "grad_x")
    assert_within(bias.grad, total(exactly(grad_y)).to(dtype), "grad_bias")


@backends
def test_leading_dimensions_and_strides(backend):
    packed, state = qk.quantize_nf4(gaussian(33, 96))
    x = gaussian(96, 5, 4).permute(2, 1, 0)
    with qk.use_backend(backend):
        y = qk.linear_nf4(x, packed, state)
        rows = qk.linear_nf4(x.reshape(-1, 96).contiguous(), packed, state)
        vector = qk.linear_nf4(x[0, 0], packed, state)
    assert y.shape == (4, 5, 33)
    assert_repeats(y.reshape(-1, 33), rows, backend, terms=96)
    assert vector.shape == (33,)


@backends
def test_same_call_same_bits(backend):
    packed, state = qk.quantize_nf4(gaussian(192, 320))
    x = gaussian(65, 320, dtype=torch.bfloat16)
    with qk.use_backend(backend):
        assert_repeats(qk.linear_nf4(x, packed, state), qk.linear_nf4(x, packed, state), backend, terms=320)


def test_refuses_bad_arguments():
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    with pytest.raises(ValueError, match=r"linear_nf4: x.shape\[-1\] must equal K=64, got shape \(3, 63\)"):
        qk.linear_nf4(torch.zeros(3, 63), packed, state)
    with pytest.raises(TypeError, match=r"linear_nf4: x must be float32, bfloat16 or float16, got torch.int64"):
        qk.linear_nf4(torch.zeros(3, 64, dtype=torch.int64), packed, state)
    with pytest.raises(ValueError, match=r"linear_nf4: bias must have 8 elements, got 9"):
        qk.linear_nf4(torch.zeros(3, 64), packed, state, torch.zeros(9))
    with pytest.raises(ValueError, match=r"linear_nf4: packed must have 256 elements"):
        qk.linear_nf4(torch.zeros(3, 64), packed[1:], state)
    packed, state = qk.quantize_nf4(gaussian(8, 8, 8))
    with pytest.raises(ValueError, match=r"linear_nf4: state must describe a two-dimensional weight"):
        qk.linear_nf4(torch.zeros(3, 64), packed, state)


@backends
@double_quants
def test_opcheck(backend, double_quant):
    packed, state = qk.quantize_nf4(gaussian(8, 96), double_quant=double_quant)
    x, bias = gaussian(3, 96).requires_grad_(), gaussian(8).requires_grad_()
    with qk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4,
            (x, *weight_of("opcheck", packed, state), bias),
        )
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4_grad_x,
            (gaussian(3, 8), *weight_of("opcheck", packed, state)),
        )
