"""ChunkedLoss equals the loss that the model computes with all logits in memory, including gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_kernels.ops.registry import unavailable
from qlora_kernels.training import ChunkedLoss, chunked_loss, collate, perplexity
from qlora_kernels.training.batches import Batch
from qlora_kernels.training.windows import IGNORED, Example
from tests.support.tolerances import assert_same_gradients, gamma
from tests.training.small_model import HIDDEN, VOCABULARY, Model


def batch_of(rows: int = 3, length: int = 11) -> Batch:
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3:7] = IGNORED
    return Batch(ids, labels, None)


def whole_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch.input_ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)


@pytest.mark.parametrize("cap", [None, 0.5], ids=["head-last", "capped"])
@pytest.mark.parametrize("trained", ["all", "head-frozen"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_value_and_gradients(cap, trained, chunk):
    batch = batch_of()
    expected, model = Model(cap), Model(cap)
    for m in (expected, model):
        m.head.requires_grad_(trained == "all")
    loss = ChunkedLoss(model, chunk)
    assert loss.chunked == (cap is None)
    whole = whole_loss(expected, batch)
    got = loss(batch)
    (3 * whole).backward()
    (3 * got).backward()
    # Softmax and the sum over 29 tokens, of one sign, are fp32: that many roundings, and a few for the logarithm.
    assert got.item() == pytest.approx(whole.item(), rel=gamma(2 * 40, torch.float32))
    found, wanted = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, expected))
    assert_same_gradients(found, wanted, products=3)


def test_head_is_restored_after_exception():
    model = Model()
    head = model.head
    loss = ChunkedLoss(model)
    with pytest.raises(IndexError):
        loss(Batch(torch.full((1, 4), VOCABULARY), torch.zeros(1, 4, dtype=torch.long), None))
    assert model.head is head


def test_logits_of_whole_batch_are_never_allocated():
    largest = 0

    class Head(nn.Linear):
        def forward(self, x):
            nonlocal largest
            largest = max(largest, x.shape[:-1].numel())
            return super().forward(x)

    model = Model(dtype=torch.float32)
    model.head = Head(HIDDEN, VOCABULARY)
    loss = ChunkedLoss(model, chunk=5)
    largest = 0
    loss(batch_of()).backward()
    assert largest == 5


@pytest.mark.skipif(unavailable("cpu") is not None, reason="the native CPU backend is not built")
def test_a_frozen_linear_head_runs_on_the_op(monkeypatch):
    """The chunks are for all other heads: trained, with hooks, or of another class or dtype."""
    monkeypatch.setattr(chunked_loss, "ChunkedCrossEntropy", None)
    model = Model(dtype=torch.float32)
    model.head.requires_grad_(False)
    expected = whole_loss(model, batch_of())
    got = ChunkedLoss(model)(batch_of())
    assert got.item() == pytest.approx(expected.item(), rel=gamma(2 * 40, torch.float32))
    found, wanted = (torch.autograd.grad(loss, model.embedding.weight) for loss in (got, expected))
    assert_same_gradients({"embedding": found[0]}, {"embedding": wanted[0]}, products=3)


def test_perplexity_covers_learned_tokens_for_any_batching():
    model = Model(dtype=torch.float32).train()
    torch.manual_seed(3)
    examples = []
    for length in (5, 9, 9, 4):
        ids = torch.randint(0, VOCABULARY, (length,))
        examples.append(Example(ids, torch.where(torch.arange(length) < 2, IGNORED, ids)))
    one, all_at_once = (perplexity(ChunkedLoss(model), examples, size) for size in (1, 4))
    assert one.tokens == all_at_once.tokens == 3 + 7 + 7 + 2
    # The relative error of exp(loss) is the absolute error of the loss, below 4: logits of 16 terms, a softmax and a
    # sum.
    error = 4 * gamma(2 * 40, torch.float32)
    assert one.value == pytest.approx(all_at_once.value, rel=error)
    total = sum(whole_loss(model, collate([e])).item() for e in examples)
    assert one.value == pytest.approx(torch.tensor(total / one.tokens).exp().item(), rel=error)
    assert model.training
