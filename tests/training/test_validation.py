"""Evaluation during training: the best step is kept, training stops early, and both survive an interruption exactly."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qlora_kernels import peft
from qlora_kernels.training import ChunkedLoss, Evaluated, Interrupted, TrainConfig, Validation, perplexity, train
from qlora_kernels.training.run_state import ResumeError
from qlora_kernels.training.windows import Example
from tests.peft.models import make

STEPS = 6
CONFIG = TrainConfig(steps=STEPS, batch_size=2, lr=3e-2, checkpoint_every=2)
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
METHODS = {
    "lora": peft.LoraConfig(r=2, lora_dropout=0.2, **TARGETS),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=STEPS, **TARGETS),
}


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    return [Example(ids, ids) for ids in torch.randint(0, 30, (6, 8), generator=generator)]


def run(method, folder, *, values=None, patience=0, stop_after=None, config=CONFIG, resume=False):
    """(records, validation, trained parameters, the snapshot of each step).   values: of the evaluations, or real."""
    torch.manual_seed(7)
    model = peft.get_peft_model(make("llama"), METHODS[method])
    loss = ChunkedLoss(model)
    seen, after = [], {}

    def parameters():
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def measure():
        after[seen[-1].step] = parameters()
        return values[seen[-1].step] if values else perplexity(loss, examples()[:3], 3).value

    validation = Validation(measure, 2, patience)
    records = train(
        loss,
        examples(),
        lambda trained: torch.optim.AdamW(trained, lr=1e-2),
        config,
        checkpoints=folder,
        resume=resume,
        validation=validation,
        on_step=seen.append,
        interrupted=lambda: seen[-1].step == stop_after,
    )
    return records, validation, parameters(), after


@pytest.mark.parametrize("method", METHODS)
def test_the_best_step_is_kept(tmp_path, method):
    records, validation, parameters, after = run(method, tmp_path, values={2: 3.0, 4: 1.0, 6: 2.0})
    assert len(records) == STEPS
    assert validation.best == Evaluated(4, 1.0)
    assert not all(torch.equal(after[4][name], after[6][name]) for name in parameters)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, after[4][name]), name
    # A run that has ended is restored to the same step, from its last checkpoint.
    again, restored, same, _ = run(method, tmp_path, values={}, resume=True)
    assert (again, restored.records) == (records, validation.records)
    assert all(torch.equal(same[name], parameter) for name, parameter in parameters.items())


def test_training_stops_where_nothing_improves(tmp_path):
    values = {2: 1.0, 4: 1.0, 6: 3.0, 8: 0.5}
    config = dataclasses.replace(CONFIG, steps=8, checkpoint_every=0)
    records, validation, parameters, after = run("lora", tmp_path, values=values, patience=2, config=config)
    assert [record.step for record in validation.records] == [2, 4, 6]
    assert len(records) == 6
    assert all(torch.equal(after[2][name], parameter) for name, parameter in parameters.items())
    assert validation.reason() == (
        "step 2 has the lowest value (1.0000) of 3 evaluations; training stopped at step 6, after 2 without a lower one"
    )
    again, restored, _, _ = run("lora", tmp_path, values=values, patience=2, config=config, resume=True)
    assert (len(again), restored.stops) == (6, True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_interrupted_and_resumed_is_the_same_run(tmp_path, method, stop_after):
    whole, validation, parameters, _ = run(method, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"stopped after step {stop_after} of {STEPS}") as stopped:
        run(method, tmp_path / "cut", stop_after=stop_after)
    assert stopped.value.checkpoint == tmp_path / "cut" / f"step-{stop_after:08d}.safetensors"
    resumed, restored, same, _ = run(method, tmp_path / "cut", resume=True)
    assert [(r.loss, r.grad_norm) for r in resumed] == [(r.loss, r.grad_norm) for r in whole]
    assert restored.records == validation.records
    assert all(torch.equal(same[name], parameter) for name, parameter in parameters.items())


def test_evaluation_changes_no_step(tmp_path):
    """Dropout draws from torch's generator, which an evaluation leaves alone."""
    losses = []
    for every in (1, 99):
        torch.manual_seed(7)
        model = peft.get_peft_model(make("llama"), METHODS["lora"])
        loss = ChunkedLoss(model)
        validation = Validation(lambda loss=loss: perplexity(loss, examples()[:3], 3).value, every)
        records = train(loss, examples(), lambda p: torch.optim.AdamW(p, lr=1e-2), CONFIG, validation=validation)
        losses.append([record.loss for record in records])
        assert len(validation.records) == (STEPS if every == 1 else 1)
    assert losses[0] == losses[1]


def test_checkpoints_of_another_run_are_refused_not_removed(tmp_path):
    run("lora", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResumeError, match=r"must hold no other run's checkpoints, got .*step-00000004"):
        run("lora", tmp_path)
    with pytest.raises(ResumeError, match="another patience"):
        run("lora", tmp_path, patience=1, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_counts_without_meaning_are_refused():
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        Validation(lambda: 0.0, 0)
    with pytest.raises(ValueError, match="patience must be >= 0, got -1"):
        Validation(lambda: 0.0, 1, -1)
