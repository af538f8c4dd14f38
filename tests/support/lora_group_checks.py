"""Problems of linear_nf4_lora_group, and their comparison with float64."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import Dropout, arithmetic_of, lora_backward, lora_down, lora_forward
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within

SHAPES = [
    pytest.param(3, 64, (40, 17), (4, 3), id="M3-K64"),
    pytest.param(1, 70, (33, 40, 37), (1, 2, 16), id="M1-K70"),
    pytest.param(67, 320, (96, 32, 32), (16, 16, 16), id="M67-K320"),
    pytest.param(9, 128, (1024, 33), (2, 5), id="M9-N1024"),  # rows of 2 KiB, which the CPU copies
]
SCALINGS = (2.0, 0.5, 1.5)


def problem(M, K, widths, ranks, dtype):
    """Return weights, biases, and the leaves x, each lora_A and each lora_B, for which gradients are computed."""
    weights = [qk.quantize_nf4(gaussian(N, K, seed=i) / K**0.5) for i, N in enumerate(widths)]
    factors_A = [(gaussian(r, K, seed=10 + i) / K**0.5).to(dtype).float() for i, r in enumerate(ranks)]
    pairs = zip(widths, ranks, strict=True)
    factors_B = [gaussian(N, r, seed=20 + i).to(dtype).float() for i, (N, r) in enumerate(pairs)]
    biases = [None if i == 1 else gaussian(N, seed=30 + i, dtype=dtype) for i, N in enumerate(widths)]
    leaves = [gaussian(M, K, dtype=dtype, seed=40), *factors_A, *factors_B]
    return weights, biases, [leaf.requires_grad_() for leaf in leaves]


def check_forward_and_gradients(backend, dtype, M, K, widths, ranks, p):
    """Compare outputs and gradients with float64. widths: out_features of each linear. ranks: r of each adapter."""
    weights, biases, leaves = problem(M, K, widths, ranks, dtype)
    seed = torch.tensor([0x1234567890ABCDEF])
    grads = [gaussian(M, N, dtype=dtype, seed=50 + i) for i, N in enumerate(widths)]
    fields = [list(field) for field in zip(*(weight_of("test", *pair) for pair in weights), strict=True)]
    x, factors_A, factors_B = leaves[0], leaves[1 : 1 + len(widths)], leaves[1 + len(widths) :]
    lora = (torch.cat(factors_A), factors_B, seed if p else None, list(SCALINGS[: len(widths)]), p)
    with qk.use_backend(backend):
        ys, s = torch.ops.qlora_kernels.linear_nf4_lora_group(x, biases, *fields, *lora)
        torch.autograd.backward(ys, grads)
    assert all(y.dtype == dtype for y in ys)
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)

    dropout = Dropout(dropout_keep(seed, M, K, p), keep_scale(p)) if p else None
    arithmetic, parts, grad_x = arithmetic_of(backend, dtype), s.split(list(ranks), dim=1), None
    for i, y in enumerate(ys):
        w, lora_A, lora_B = qk.dequantize_nf4(*weights[i], dtype), factors_A[i], factors_B[i]
        assert_within(parts[i], lora_down(x, lora_A, dropout, arithmetic), f"s_{i}")
        assert_within(y, lora_forward(x, w, biases[i], parts[i], lora_B, SCALINGS[i], arithmetic), f"y_{i}")
        operands = (grads[i], x, parts[i], w, lora_A, lora_B, SCALINGS[i], dropout, arithmetic)
        expected = lora_backward(*operands)
        assert_within(lora_A.grad, expected.lora_A, f"grad of lora_A_{i}")
        assert_within(lora_B.grad, expected.lora_B, f"grad of lora_B_{i}")
        grad_x = expected.x if grad_x is None else (grad_x + expected.x).to(dtype)
    assert_within(x.grad, grad_x, "grad of x")
