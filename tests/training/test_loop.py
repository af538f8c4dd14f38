"""The training loop: its schedule, equal gradients for any micro-batch, and exact resumption."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora_kernels.training import ChunkedLoss, TrainConfig, train
from qlora_kernels.training.run_state import ResumeError
from qlora_kernels.training.schedule import factor
from qlora_kernels.training.windows import Example
from tests.support.tolerances import gamma
from tests.training.small_model import VOCABULARY, Model

CONFIG = TrainConfig(steps=8, batch_size=3, lr=1e-2, warmup_steps=2, seed=1)


def examples(n: int = 10) -> list[Example]:
    ids = torch.randint(0, VOCABULARY, (n, 6), generator=torch.Generator().manual_seed(2))
    return [Example(row, row) for row in ids]


class Dropped(Model):
    """Model that draws random numbers in every forward of training."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)
        self.embedding = torch.nn.Sequential(self.embedding, torch.nn.Dropout(0.2))


def run(config=CONFIG, model=None, **keywords):
    model = model or Dropped()
    torch.manual_seed(5)
    return train(ChunkedLoss(model), examples(), torch.optim.AdamW, config, **keywords), model


def losses(records):
    return [(r.step, r.loss, r.lr, r.grad_norm, r.tokens) for r in records]


def test_schedule():
    cosine = [factor("cosine", step, 10, 2) for step in range(11)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True)
    assert cosine[9] > 0 == pytest.approx(cosine[10])
    assert [factor("linear", step, 5, 1) for step in range(6)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert [factor("constant", step, 5, 2) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_loss_falls_and_runs_repeat():
    (first, model), (second, _) = run(), run()
    assert losses(first) == losses(second)
    assert [r.step for r in first] == list(range(1, 9))
    assert first[-1].loss < first[0].loss
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_give_the_same_gradient():
    """The losses of one step are fp32 sums of at most 15 predictions in another order; all else is in float64.

    AdamW's first steps follow the sign of even a small gradient, which in fp32 depends on the roundings.
    """
    whole, _ = run(model=Model())
    rounding = gamma(2 * 15, torch.float32)
    parts, _ = run(dataclasses.replace(CONFIG, micro_batch=2), model=Model())
    for a, b in zip(whole, parts, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=rounding)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=rounding)
        assert a.tokens == b.tokens


@pytest.mark.parametrize("stop", [2, 4])
def test_resume_is_exact(tmp_path, stop):
    whole, model = run()
    checkpointed = dataclasses.replace(CONFIG, checkpoint_every=2)

    class Killed(Exception):
        pass

    def kill(record):
        if record.step == stop + 1:
            raise Killed

    with pytest.raises(Killed):
        run(checkpointed, checkpoints=tmp_path, on_step=kill)
    seen = []
    resumed, again = run(checkpointed, checkpoints=tmp_path, resume=True, on_step=seen.append)
    assert losses(resumed) == losses(whole)
    assert seen == resumed
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_resume_of_another_run_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_every=4)
    run(config, checkpoints=tmp_path, settings={"r": 8})
    with pytest.raises(ResumeError, match=r"another lr \(0.01 -> 0.1\), r \(8 -> 16\)"):
        run(dataclasses.replace(config, lr=0.1), checkpoints=tmp_path, settings={"r": 16}, resume=True)


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert losses(run(checkpoints=tmp_path, resume=True)[0]) == losses(run()[0])


def test_loss_that_is_not_finite_stops():
    model = Dropped()
    with torch.no_grad():
        model.mix.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss of step 1 must be finite, got nan; use a smaller lr"):
        run(model=model)


class SmallGradients(nn.Module):
    """A decoder whose gradients are far smaller than its activations; the trained matrix is fp32 in every dtype."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, 8, generator=generator).to(dtype))
        self.trained = nn.Parameter(
            torch.randn(8, 8, generator=generator).to(torch.promote_types(dtype, torch.float32))
        )
        self.head = nn.Linear(8, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
        self.head.weight.data.copy_(torch.randn(VOCABULARY, 8, generator=generator) * 1e-5)

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, head):
        self.head = head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.embedding(input_ids)
        hidden = (hidden.to(self.trained.dtype) @ self.trained).to(hidden.dtype)
        return SimpleNamespace(logits=self.head(hidden))


def test_gradients_of_an_fp16_model_do_not_underflow():
    """With the mean's factor of 1 / 1000 they would be below 6e-8, the smallest fp16 number, and become zero."""
    ids = torch.randint(0, VOCABULARY, (50, 21), generator=torch.Generator().manual_seed(4))
    config = TrainConfig(steps=1, batch_size=50, lr=0.0, max_grad_norm=0.0)
    norms = []
    for dtype in (torch.float16, torch.float64):
        rows = [Example(row, row) for row in ids]
        norms.append(train(ChunkedLoss(SmallGradients(dtype)), rows, torch.optim.AdamW, config)[0].grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
