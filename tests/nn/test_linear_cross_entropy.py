"""linear_cross_entropy beside torch's head and loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qlora_kernels as qk
from qlora_kernels.nn import linear_cross_entropy as module
from tests.support.problems import gaussian
from tests.support.tolerances import GRADIENT_FACTOR, assert_within_baseline

V, K = 97, 48


@pytest.fixture(autouse=True)
def three_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * V)


def composed(hidden, weight, labels):
    logits = F.linear(hidden, weight).flatten(0, -2)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten())


def problem(*shape, dtype):
    labels = torch.randint(V, shape, generator=torch.Generator().manual_seed(2))
    return gaussian(*shape, K, dtype=dtype, seed=0), gaussian(V, K, dtype=dtype, seed=1), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), (2, 5)], ids=str)
def test_loss_and_gradient(shape, dtype):
    hidden, weight, labels = problem(*shape, dtype=dtype)
    labels[..., 0] = -100 if labels.numel() > 1 else labels[..., 0]
    results = []
    for function, cast in ((qk.linear_cross_entropy, dtype), (composed, dtype), (composed, torch.float64)):
        x = hidden.to(cast, copy=True).requires_grad_()
        loss = function(x, weight.to(cast), labels)
        (3 * loss).backward()
        results.append((loss.detach(), x.grad))
    for name, ours, torchs, exact in zip(("loss", "grad"), *results, strict=True):
        assert_within_baseline(ours, torchs.to(ours.dtype), exact.double(), factor=GRADIENT_FACTOR, name=name)


def test_without_gradient():
    hidden, weight, labels = problem(5, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(qk.linear_cross_entropy(hidden, weight, labels), composed(hidden, weight, labels))


def test_a_trained_weight_gets_its_gradient():
    hidden, weight, labels = problem(5, dtype=torch.float32)
    weight.requires_grad_()
    qk.linear_cross_entropy(hidden, weight, labels).backward()
    (expected,) = torch.autograd.grad(composed(hidden, weight, labels), weight)
    torch.testing.assert_close(weight.grad, expected)


def test_all_ignored_is_nan_as_torchs():
    hidden, weight, labels = problem(4, dtype=torch.float32)
    assert qk.linear_cross_entropy(hidden, weight, labels, ignore_index=-100).isfinite()
    assert qk.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)).isnan()


def test_refuses_shapes_that_do_not_fit():
    hidden, weight, labels = problem(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: weight must have shape \[V, hidden.shape\[-1\]\]"):
        qk.linear_cross_entropy(hidden[:, 1:], weight, labels)
    with pytest.raises(ValueError, match="linear_cross_entropy: labels must have shape"):
        qk.linear_cross_entropy(hidden, weight, labels[1:])
