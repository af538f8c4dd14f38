"""The sm_80 PTX of rms_norm, rope and glu, executed on the host, within the bounds of the ops' tests."""

from __future__ import annotations

import torch

from qlora_kernels.backends.triton.glu import glu, glu_backward
from qlora_kernels.backends.triton.rms_norm import rms_norm, rms_norm_backward
from qlora_kernels.backends.triton.rope import rope
from tests.support import model_part_formulas as formulas
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within
from tests.support.triton_on_host import executing_ptx


def test_rms_norm():
    x, residual, grad_y, grad_s = (gaussian(5, 200, dtype=torch.bfloat16, seed=seed) for seed in range(4))
    weight = gaussian(200, dtype=torch.bfloat16, seed=4)
    with executing_ptx():
        y, s, scale = rms_norm(x, residual, weight, 1e-5, 0.0)
        grad_x, grad_weight = rms_norm_backward(grad_y, grad_s, s, weight, scale, 0.0, need_grad_weight=True)
    assert torch.equal(s, x + residual)
    assert_within(y, formulas.rms_norm(s, weight, 1e-5, 0.0), "y")
    expected = formulas.rms_norm_gradients(grad_y, grad_s, s, weight, 1e-5, 0.0)
    assert_within(grad_x, expected[0], "grad_x")
    assert_within(grad_weight, expected[1], "grad_weight")


def test_rope():
    q, k = (gaussian(2, heads, 3, 16, dtype=torch.float16, seed=heads) for heads in (3, 1))
    cos, sin = gaussian(1, 3, 16, dtype=torch.float16, seed=7), gaussian(1, 3, 16, dtype=torch.float16, seed=8)
    with executing_ptx():
        rotated = rope(q, k, cos, sin, False)
    for actual, x in zip(rotated, (q, k), strict=True):
        assert_within(actual, formulas.rope(x, cos, sin))


def test_glu():
    gate, up, grad_y = (gaussian(1500, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    with executing_ptx():
        y = glu(gate, up, "gelu_tanh")
        grads = glu_backward(grad_y, gate, up, "gelu_tanh")
    assert_within(y, formulas.glu(gate, up, "gelu_tanh"), "y")
    for actual, expected in zip(grads, formulas.glu_gradients(grad_y, gate, up, "gelu_tanh"), strict=True):
        assert_within(actual, expected)
