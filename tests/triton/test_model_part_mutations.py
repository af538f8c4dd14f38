"""Faults planted in the kernels of rms_norm, rope, glu and linear_cross_entropy are found by a comparison of each."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from tests.support import model_part_formulas as formulas
from tests.support.cross_entropy_formula import linear_cross_entropy as loss_formula
from tests.support.planted_fault import mutation_tests
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within


def rms_norm(offset, rows=3, columns=9, eps=0.1):
    """With a residual, both gradients, and columns that are no power of two."""
    x, residual, grad_y, grad_s = (gaussian(rows, columns, seed=seed) for seed in range(4))
    weight = gaussian(columns, seed=4).requires_grad_()
    y, s = qk.rms_norm(x.requires_grad_(), weight, eps, residual=residual, weight_offset=offset)
    grads = torch.autograd.grad((y, s), (x, weight), (grad_y, grad_s))
    assert torch.equal(s, x + residual)
    assert_within(y, formulas.rms_norm(s, weight, eps, offset), "y")
    for actual, expected in zip(
        grads, formulas.rms_norm_gradients(grad_y, grad_s, s, weight, eps, offset), strict=True
    ):
        assert_within(actual, expected)


def rope():
    """Strided heads, three of a block of four; tables of each row, whose halves differ; and the gradient."""
    q, k = (gaussian(2, 5, 3, 8, seed=seed)[..., :6].transpose(1, 2).requires_grad_() for seed in (1, 2))
    cos, sin = gaussian(2, 5, 6, seed=3), gaussian(2, 5, 6, seed=4)
    grads = gaussian(2, 3, 5, 6, seed=5), gaussian(2, 3, 5, 6, seed=6)
    rotated = qk.rope(q, k, cos, sin)
    for actual, x in zip(rotated, (q, k), strict=True):
        assert_within(actual, formulas.rope(x, cos, sin))
    for actual, grad in zip(torch.autograd.grad(rotated, (q, k), grads), grads, strict=True):
        assert_within(actual, formulas.rope(grad, cos, sin, inverse=True))


def glu(activation):
    gate, up, grad_y = 4 * gaussian(1100), gaussian(1100, seed=1), gaussian(1100, seed=2)
    y = qk.glu(gate.requires_grad_(), up.requires_grad_(), activation)
    grads = torch.autograd.grad(y, (gate, up), grad_y)
    assert_within(y, formulas.glu(gate, up, activation), "y")
    for actual, expected in zip(grads, formulas.glu_gradients(grad_y, gate, up, activation), strict=True):
        assert_within(actual, expected)


def loss(V=4100, K=8, nf4=False):
    """Two blocks of the vocabulary, of which the second has four columns; a bias, a scale and a cap."""
    hidden, weight = gaussian(4, K).requires_grad_(), 2 * gaussian(V, K, seed=1)
    labels, bias = torch.tensor([V - 1, -100, 7, 4097 % V]), gaussian(V, seed=2)
    options = {"logit_scale": 0.7, "softcap": 5.0}
    state = None
    if nf4:
        packed, state = qk.quantize_nf4(weight)
        weight = qk.dequantize_nf4(packed, state)
    head = weight if state is None else packed
    losses = qk.linear_cross_entropy(hidden, head, labels, bias, state=state, reduction="none", **options)
    (rows,) = torch.autograd.grad(losses.sum(), hidden)
    expected = loss_formula(hidden, weight, labels, bias, rounds_gradient=True, **options)
    assert_within(losses, expected.losses, "losses")
    assert_within(rows, expected.rows, "rows")


CHECKS = {
    "llama norm": lambda: rms_norm(0.0),
    "gemma norm": lambda: rms_norm(1.0),
    "many rows": lambda: rms_norm(0.0, rows=258, columns=2),
    "rope": rope,
    "silu": lambda: glu("silu"),
    "gelu": lambda: glu("gelu_tanh"),
    "loss": loss,
    "loss of parts": lambda: loss(V=70, nf4=True),
}

MUTATIONS = [
    ("rms_norm", "s.to(tl.float32) + tl.load(p_residual", "s.to(tl.float32) - tl.load(p_residual", "llama norm"),
    ("rms_norm", "axis=0) / columns + eps", "axis=0) / BLOCK_C + eps", "llama norm"),
    ("rms_norm", "/ columns + eps", "/ columns", "llama norm"),
    ("rms_norm", "tl.store(p_scale + row, scale)", "tl.store(p_scale + row, scale * 2)", "llama norm"),
    ("rms_norm", "n * (weight + 1.0)", "n * weight", "gemma norm"),
    ("rms_norm", "weight += 1.0", "weight += 0.0", "gemma norm"),
    ("rms_norm", "axis=0) / columns))", "axis=0) / BLOCK_C))", "llama norm"),
    ("rms_norm", "g - n * (", "g + n * (", "llama norm"),
    ("rms_norm", "grad_x += tl.load(p_grad_s", "grad_x += 0 * tl.load(p_grad_s", "llama norm"),
    ("rms_norm", "part += grad_y * n", "part += g * n", "llama norm"),
    ("rms_norm", "o_x += step", "o_x += 0", "many rows"),
    ("rope", "to_a, to_b = sin_b, -sin_a", "to_a, to_b = -sin_a, sin_b", "rope"),
    ("rope", "to_a, to_b = -sin_a, sin_b", "to_a, to_b = -sin_b, sin_a", "rope"),
    ("rope", "batch * table_stride", "0 * table_stride", "rope"),
    ("rope", "b * cos_b", "b * cos_a", "rope"),
    ("rope", "t * out_stride_token", "t * stride_token", "rope"),
    ("rope", "token // T, token % T", "token // T, token // T", "rope"),
    ("rope", "(o_h < heads)", "(o_h < heads + 1)", "rope"),
    ("glu", "square * CUBIC_SLOPE", "square * CUBIC", "gelu"),
    ("glu", "tl.maximum(gate, -32.0), 32.0", "tl.maximum(gate, -2.0), 2.0", "gelu"),
    ("glu", "y = gate * tl.sigmoid(u)", "y = gate * tl.sigmoid(gate)", "gelu"),
    ("glu", "activated * tl.sigmoid(-u)", "activated * tl.sigmoid(u)", "silu"),
    ("glu", "* u_slope", "", "gelu"),
    ("glu", "(grad_y * up * slope)", "(grad_y * slope)", "silu"),
    ("glu", "(grad_y * activated)", "(grad_y * gate)", "silu"),
    ("glu", "m = o < numel", "m = o < numel + 1", "silu"),
    ("linear_cross_entropy", "(z + bias) * logit_scale", "z * logit_scale + bias", "loss"),
    ("linear_cross_entropy", "softcap * (1.0 - 2.0", "softcap * (1.0 - 1.9", "loss"),
    ("linear_cross_entropy", "total * tl.exp(top - base) + tl.exp", "total + tl.exp", "loss"),
    ("linear_cross_entropy", "tl.sum(total * tl.exp(top - base), axis=0)", "tl.sum(total, axis=0)", "loss"),
    ("linear_cross_entropy", "columns == label", "columns == label + 1", "loss"),
    ("linear_cross_entropy", "1.0 - t * t", "1.0 - t", "loss"),
    ("linear_cross_entropy", "grad * logit_scale", "grad", "loss"),
    ("linear_cross_entropy", "tl.where(learned, loss, 0.0)", "loss", "loss"),
    ("linear_cross_entropy", "tl.exp(z - log_sum)", "tl.exp(z - highest)", "loss"),
    ("linear_cross_entropy", "tl.where(learned, tl.where(", "tl.where(label > -101, tl.where(", "loss"),
    ("linear_cross_entropy", "p_out + row * V + columns", "p_out + columns", "loss"),
    ("linear_cross_entropy", "inside = columns < V", "inside = columns < V - 1", "loss"),
    ("linear_cross_entropy", "products[:, columns] = part", "products[:, : part.shape[1]] = part", "loss of parts"),
    ("linear_cross_entropy", "total.add_(product)", "product", "loss of parts"),
]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    """Heads that are not dense have parts of 32 rows."""
    monkeypatch.setattr("qlora_kernels.ops.output_head.DECODED_BYTES", 32 * 8 * 4)
    with qk.use_backend("triton"):
        yield


test_checks_pass_unmutated, test_mutation_is_detected = mutation_tests(CHECKS, MUTATIONS)
