"""linear_cross_entropy against float64, interpreted: chunks of tokens, vocabularies beyond a block, bad labels."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends.triton import linear_cross_entropy as module
from qlora_kernels.ops.output_head import Head
from tests.support.cross_entropy_formula import linear_cross_entropy as formula
from tests.support.problems import DTYPES, dtype_name, gaussian
from tests.support.tolerances import assert_within

M, V, K = 7, 75, 24


def problem(dtype):
    hidden = gaussian(M, K, dtype=dtype)
    labels = torch.arange(M) * 13 % V
    labels[4] = -100
    return hidden, (3 * gaussian(V, K, seed=1) / K**0.5).to(torch.bfloat16), labels, gaussian(V, seed=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.7}], ids=["plain", "softcap"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_losses_and_gradient(monkeypatch, dtype, options, has_bias):
    """Three chunks of tokens, and five blocks of the vocabulary of which the last is short."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * V)
    monkeypatch.setattr(module, "BLOCK", 16)
    hidden, weight, labels, bias = problem(dtype)
    hidden.requires_grad_()
    bias = bias if has_bias else None
    with qk.use_backend("triton"):
        losses = qk.linear_cross_entropy(hidden, weight, labels, bias, reduction="none", **options)
        losses.sum().backward()
    expected = formula(hidden, weight, labels, bias, rounds_gradient=True, **options)
    assert_within(losses, expected.losses, "losses")
    assert_within(hidden.grad, expected.rows, "grad_hidden")


def test_minus_infinity_over_a_whole_block(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    hidden, weight, labels, bias = problem(torch.float32)
    bias[:32] = -float("inf")
    labels = labels.where(labels < 0, 40 + labels % 30)
    with qk.use_backend("triton"):
        losses = qk.linear_cross_entropy(hidden, weight, labels, bias, reduction="none")
    expected = formula(hidden, weight[32:], labels.where(labels < 0, labels - 32), bias[32:])
    assert_within(losses, expected.losses)


def test_label_outside_vocabulary_gives_nan():
    """On a GPU the op does not check labels beforehand."""
    hidden, weight, labels, _ = problem(torch.float32)
    labels[1], labels[2] = V, -1
    losses, _, rows = module.linear_cross_entropy(
        hidden, labels, Head(weight, None, -100, 1.0, 0.0), need_grad_hidden=True
    )
    assert losses.isnan().tolist() == [False, True, True, False, False, False, False]
    assert rows.isnan().all(1).tolist() == losses.isnan().tolist()
