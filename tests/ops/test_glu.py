"""glu against float64: both activations, gradients, extreme values, bad input."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.glu import ACTIVATIONS
from tests.support.model_part_formulas import glu, glu_gradients
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_within

backends = pytest.mark.parametrize("backend", usable_backends("glu"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@backends
@dtypes
@activations
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 3, 64), (5, 1001)], ids=str)
def test_forward_and_gradients(backend, dtype, activation, shape):
    gate, up = gaussian(*shape, dtype=dtype) * 4, gaussian(*shape, dtype=dtype, seed=1)
    grad_y = gaussian(*shape, dtype=dtype, seed=2)
    with qk.use_backend(backend):
        y = qk.glu(gate.requires_grad_(), up.requires_grad_(), activation)
        grads = torch.autograd.grad(y, (gate, up), grad_y)
    assert y.dtype == dtype
    assert_within(y, glu(gate, up, activation), "y")
    for actual, expected, name in zip(grads, glu_gradients(grad_y, gate, up, activation), ("gate", "up"), strict=True):
        assert_within(actual, expected, f"grad_{name}")


@backends
@activations
def test_large_gates(backend, activation):
    """The sigmoid is 0 or 1 without an overflow on the way, and NaN stays NaN."""
    gate = torch.tensor([-3e38, -1e6, -100.0, -87.0, 87.0, 100.0, 1e6, 3e38]).requires_grad_()
    with qk.use_backend(backend):
        y = qk.glu(gate, torch.ones(8), activation)
        (slope,) = torch.autograd.grad(y.sum(), gate)
        assert qk.glu(torch.tensor([torch.nan]), torch.ones(1), activation).isnan().all()
    expected = gate.detach().clamp_min(0)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(slope, (expected > 0).float(), rtol=1e-6, atol=1e-30)


@backends
def test_empty_and_strided(backend):
    gate, up = gaussian(6, 10), gaussian(10, 6, seed=1).T
    with qk.use_backend(backend):
        assert torch.equal(qk.glu(gate, up, "silu"), qk.glu(gate, up.contiguous(), "silu"))
        empty = qk.glu(gate[:0].requires_grad_(), up[:0], "silu")
        empty.sum().backward()
    assert empty.shape == (0, 10)


def test_refuses_bad_arguments():
    gate = gaussian(3, 8)
    with pytest.raises(ValueError, match=r"glu: activation must be one of \('silu', 'gelu_tanh'\), got 'relu'"):
        qk.glu(gate, gate, "relu")
    with pytest.raises(ValueError, match=r"glu: up must have the shape of gate, \(3, 8\), got \(2, 8\)"):
        qk.glu(gate, gate[1:], "silu")
    with pytest.raises(TypeError, match=r"glu: up must have dtype torch.float32 beside gate, got torch.float16"):
        qk.glu(gate, gate.half(), "silu")
    with pytest.raises(TypeError, match=r"glu: gate must be float32, bfloat16 or float16, got torch.int64"):
        qk.glu(gate.long(), gate.long(), "silu")


@backends
@activations
def test_opcheck(backend, activation):
    gate, up = gaussian(3, 8).requires_grad_(), gaussian(3, 8, seed=1).requires_grad_()
    with qk.use_backend(backend):
        torch.library.opcheck(torch.ops.qlora_kernels.glu, (gate, up, activation))
        torch.library.opcheck(
            torch.ops.qlora_kernels.glu_backward, (gaussian(3, 8, seed=2), gate.detach(), up.detach(), activation)
        )
