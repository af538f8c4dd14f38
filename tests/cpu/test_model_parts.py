"""rms_norm, rope and glu on every instruction set of this machine, with partial vectors and any number of threads."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends import cpu
from tests.cpu.instruction_sets import SETS
from tests.support.model_part_formulas import glu, glu_gradients, rms_norm, rms_norm_gradients, rope
from tests.support.problems import DTYPES, dtype_name, gaussian
from tests.support.tolerances import assert_within

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
EPS = 1e-6


@pytest.fixture(params=[isa for isa in SETS if not isa.startswith("amx")])
def isa(request):
    cpu.instruction_set(request.param)
    with qk.use_backend("cpu"):
        yield request.param
    cpu.instruction_set("")


@dtypes
@pytest.mark.parametrize("columns", [1, 15, 64, 77, 200])
def test_rms_norm(isa, dtype, columns):
    x, residual, grad_y, grad_s = (gaussian(70, columns, dtype=dtype, seed=seed) for seed in range(4))
    weight = gaussian(columns, dtype=dtype, seed=4).requires_grad_()
    y, s = qk.rms_norm(x.requires_grad_(), weight, EPS, residual=residual, weight_offset=float(columns % 2))
    grads = torch.autograd.grad((y, s), (x, weight), (grad_y, grad_s))
    assert torch.equal(s, x + residual)
    assert_within(y, rms_norm(s, weight, EPS, columns % 2), "y")
    expected = rms_norm_gradients(grad_y, grad_s, s, weight, EPS, columns % 2)
    for actual, bound, name in zip(grads, expected, ("grad_x", "grad_weight"), strict=True):
        assert_within(actual, bound, name)


@dtypes
@pytest.mark.parametrize("D", [2, 14, 64, 72])
def test_rope(isa, dtype, D):
    q, k = (gaussian(2, 9, heads, D, dtype=dtype, seed=heads).transpose(1, 2) for heads in (3, 1))
    cos, sin = (gaussian(1, 9, D, dtype=dtype, seed=seed) for seed in (7, 8))
    for inverse in (False, True):
        rotated = torch.ops.qlora_kernels.rope(q, k, cos, sin, inverse)
        for actual, x in zip(rotated, (q, k), strict=True):
            assert_within(actual, rope(x, cos, sin, inverse))


@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu(isa, dtype, activation):
    """The range covers every branch of the sigmoid, and the tail is a partial vector."""
    gate = torch.cat([torch.linspace(-95, 95, 4001), gaussian(1002) * 0.01]).to(dtype)
    up, grad_y = gaussian(gate.numel(), dtype=dtype, seed=1), gaussian(gate.numel(), dtype=dtype, seed=2)
    y = qk.glu(gate.requires_grad_(), up.requires_grad_(), activation)
    assert_within(y, glu(gate, up, activation), "y")
    grads = torch.autograd.grad(y, (gate, up), grad_y)
    for actual, expected in zip(grads, glu_gradients(grad_y, gate, up, activation), strict=True):
        assert_within(actual, expected)


def test_threads_do_not_change_the_bits(isa):
    """The gradient of the weight is summed in an order that does not depend on the number of threads."""
    x, grad_y = gaussian(2500, 96, dtype=torch.bfloat16), gaussian(2500, 96, dtype=torch.bfloat16, seed=1)
    weight, results = torch.ones(96), []
    scale = x.float().square().mean(-1).rsqrt()
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                torch.ops.qlora_kernels.rms_norm_backward(grad_y.float(), None, x, weight, scale, EPS, 0.0, True)
            )
    finally:
        torch.set_num_threads(threads)
    for grad_x, grad_weight in results[1:]:
        assert torch.equal(grad_x, results[0][0])
        assert torch.equal(grad_weight, results[0][1])
