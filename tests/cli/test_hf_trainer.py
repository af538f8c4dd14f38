"""`--trainer hf`: the losses of the exact loop, and what it refuses."""

from __future__ import annotations

import os
import signal

import pytest

from tests.cli.finetune_runs import arguments, finetune, losses, refused
from tests.support.tiny_model import write_tiny_llama

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Examples of several lengths, so that means over micro batches and over a batch differ."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{"a" * (i % 5)}:", "completion": "{"b" * (i % 7)}"}}\n' for i in range(20)))
    return path


OPTIONS = ["--batch", "3", "--micro-batch", "2", "--weight-decay", "0.1", "--compute-dtype", "fp32", "--clip", "0.5"]


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_losses_are_those_of_the_exact_loop(capsys, model, data, tmp_path, method):
    """Trainer differs in roundings alone: the batches, their weights, clipping and the schedules are the same."""
    options = [*OPTIONS, "--method", method]
    own = finetune(capsys, model, data, tmp_path / "own", *options)
    hf = finetune(capsys, model, data, tmp_path / "hf", *options, "--trainer", "hf")
    for (a, norm_a), (b, norm_b) in zip(losses(own), losses(hf), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert norm_a == pytest.approx(norm_b, rel=1e-3)
    assert [step["lr"] for step in own["steps"]] == [step["lr"] for step in hf["steps"]]
    assert [step["tokens"] for step in own["steps"]] == [step["tokens"] for step in hf["steps"]]
    name = "NF4 + adapter, reloaded"
    assert hf["perplexity"][name] == pytest.approx(own["perplexity"][name], rel=1e-3)
    assert hf["options"]["trainer"] == "hf"


def test_a_signal_keeps_the_adapter(capsys, monkeypatch, model, data, tmp_path):
    from qlora_kernels.cli import finetune_training

    on_step = finetune_training.TrainingStage._on_step

    def kill(self, step):
        on_step(self, step)
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(finetune_training.TrainingStage, "_on_step", kill)
    from qlora_kernels.cli import main

    assert main(arguments(model, data, tmp_path, "--trainer", "hf")) == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert "after step 3 of 6; --trainer hf cannot be resumed, the adapter so far is in" in line
    assert (tmp_path / "adapter-step-3" / "adapter_model.safetensors").is_file()


def test_options_unsupported_by_trainer_are_refused(capsys, model, data, tmp_path):
    def line(*more):
        return refused(capsys, *arguments(model, data, tmp_path / "out", "--trainer", "hf", *more))

    assert "must come without --checkpoint-every, --resume, which" in line("--checkpoint-every", "2", "--resume")
    assert "must come without --eval-every" in line("--eval-every", "2")
    assert not (tmp_path / "out").exists()
