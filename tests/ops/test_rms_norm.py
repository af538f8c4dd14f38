"""rms_norm against float64: y, the sum, both gradients, dtypes of both forms, bad input."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from tests.support.model_part_formulas import rms_norm, rms_norm_gradients
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_within, gamma

EPS = 1e-5
SHAPES = ((1, 1), (3, 7), (2, 5, 64), (33, 129), (70, 576))
backends = pytest.mark.parametrize("backend", usable_backends("rms_norm"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
offsets = pytest.mark.parametrize("offset", [0.0, 1.0], ids=["llama", "gemma"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def operands(shape, dtype, weight_dtype=None):
    """(x, residual, weight, grad_y's source, grad_s)."""
    x, residual, grad_y, grad_s = (gaussian(*shape, dtype=dtype, seed=seed) for seed in range(4))
    return x, residual, gaussian(shape[-1], dtype=weight_dtype or dtype, seed=4) + 1, grad_y, grad_s


@backends
@dtypes
@offsets
@shapes
def test_with_a_residual(backend, dtype, offset, shape):
    x, residual, weight, grad_y, grad_s = operands(shape, dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    with qk.use_backend(backend):
        y, s = qk.rms_norm(x, weight, EPS, residual=residual, weight_offset=offset)
        grads = torch.autograd.grad((y, s), leaves, (grad_y, grad_s))
    assert torch.equal(s, x + residual)
    assert_within(y, rms_norm(s, weight, EPS, offset), "y")
    grad_x, grad_weight = rms_norm_gradients(grad_y, grad_s, s, weight, EPS, offset)
    assert_within(grads[0], grad_x, "grad_x")
    assert torch.equal(grads[0], grads[1])
    assert_within(grads[2], grad_weight, "grad_weight")


@backends
@offsets
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")], ids=str)
def test_without_a_residual_and_with_a_weight_of_another_dtype(backend, offset, dtypes):
    """y has transformers' dtype: fp32 masters of the weight make y fp32 in Llama's form."""
    dtype, weight_dtype = (getattr(torch, name) for name in dtypes)
    x, _, weight, _, _ = operands((5, 40), dtype, weight_dtype)
    with qk.use_backend(backend):
        y, s = qk.rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS, weight_offset=offset)
        grad_y = gaussian(5, 40, dtype=y.dtype, seed=9)
        grads = torch.autograd.grad(y, (x, weight), grad_y)
    assert s is x
    assert y.dtype == (dtype if offset else torch.float32)
    assert_within(y, rms_norm(x, weight, EPS, offset), "y")
    expected = rms_norm_gradients(grad_y, None, x, weight, EPS, offset)
    for actual, bound, name in zip(grads, expected, ("grad_x", "grad_weight"), strict=True):
        assert_within(actual, bound, name)
    assert [grad.dtype for grad in grads] == [dtype, weight_dtype]


@backends
def test_gradients_of_unused_outputs_and_frozen_weight(backend):
    """If y is unused, the gradient of the sum passes through; a frozen weight gets no gradient."""
    x, residual, weight, _, grad_s = operands((4, 24), torch.float32)
    with qk.use_backend(backend):
        _, s = qk.rms_norm(x.requires_grad_(), weight, EPS, residual=residual)
        assert torch.equal(torch.autograd.grad(s, x, grad_s)[0], grad_s)
        y, _ = qk.rms_norm(x, weight, EPS, residual=residual)
        y.sum().backward()
    assert weight.grad is None
    assert residual.grad is None


@backends
def test_empty_and_strided(backend):
    x, residual, weight, _, _ = operands((6, 4, 10), torch.float32)
    with qk.use_backend(backend):
        y, _ = qk.rms_norm(x.transpose(0, 1), weight, EPS, residual=residual.transpose(0, 1))
        plain, _ = qk.rms_norm(x, weight, EPS, residual=residual)
        empty, total = qk.rms_norm(x[:0].requires_grad_(), weight.requires_grad_(), EPS, residual=residual[:0])
        empty.sum().backward()
    assert torch.equal(y, plain.transpose(0, 1))
    assert empty.shape == total.shape == (0, 4, 10)
    assert torch.equal(weight.grad, torch.zeros(10))


def test_equals_transformers():
    """The results equal those of transformers' modules but for roundings in fp32, and one rounding of each of n and y.

    n = x / sqrt(mean(x^2) + eps). Its relative error is half of that of the mean, whose terms are all positive, and
    those of the root, the quotient and the product with w. Both sides have such an error, in any order of the sum.
    """
    K = 96
    error = 2 * (gamma(K + 2, torch.float32) / 2 + gamma(4, torch.float32))
    for dtype, roundings in ((torch.float32, 0), (torch.bfloat16, 2)):
        x, _, weight, _, _ = operands((9, K), dtype)
        n = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(dtype)
        rtol = error + roundings * torch.finfo(dtype).eps
        torch.testing.assert_close(qk.rms_norm(x, weight, EPS)[0], weight * n, rtol=rtol, atol=0)


def test_refuses_bad_arguments():
    x, residual, weight, _, _ = operands((3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"rms_norm: weight must have one element for each of the last dimension of x"):
        qk.rms_norm(x, weight[1:], EPS)
    with pytest.raises(ValueError, match=r"rms_norm: residual must have the shape of x, \(3, 8\), got \(2, 8\)"):
        qk.rms_norm(x, weight, EPS, residual=residual[1:])
    with pytest.raises(TypeError, match=r"rms_norm: residual must have dtype torch.float32 beside x"):
        qk.rms_norm(x, weight, EPS, residual=residual.half())
    with pytest.raises(TypeError, match=r"rms_norm: x must be float32, bfloat16 or float16, got torch.float64"):
        qk.rms_norm(x.double(), weight, EPS)
    with pytest.raises(ValueError, match=r"rms_norm: weight_offset must be 0.0 or 1.0, got 0.5"):
        qk.rms_norm(x, weight, EPS, weight_offset=0.5)
    with pytest.raises(ValueError, match=r"rms_norm: eps must be zero or positive, got -1"):
        qk.rms_norm(x, weight, -1.0)


@backends
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(backend, with_residual):
    x, residual, weight, grad_y, grad_s = operands((3, 16), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    if not with_residual:
        leaves[1] = grad_s = None
    s, scale = x.detach(), torch.ones(3)
    with qk.use_backend(backend):
        torch.library.opcheck(torch.ops.qlora_kernels.rms_norm, (*leaves, EPS, 0.0))
        arguments = (grad_y, grad_s, s, weight.detach(), scale, EPS, 1.0, True)
        torch.library.opcheck(torch.ops.qlora_kernels.rms_norm_backward, arguments)
