"""`qlora-kernels finetune` left alone: epochs, evaluations, signals, recipes, trackers, other runs' checkpoints."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qlora_kernels.cli import main, trackers
from qlora_kernels.cli.finetune_options import FinetuneOptions
from qlora_kernels.cli.interrupts import deferred
from qlora_kernels.cli.main import command_parser
from qlora_kernels.cli.recipes import read_recipe, write_recipe
from qlora_kernels.training import Perplexity, perplexity
from tests.cli.finetune_runs import arguments, files_of, finetune, losses, refused
from tests.support.tiny_model import write_jsonl, write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


def without(parts: list[str], option: str) -> list[str]:
    i = parts.index(option)
    return parts[:i] + parts[i + 2 :]


def test_epochs_become_steps_of_the_trained_examples(capsys, model, tmp_path):
    """9 examples in batches of 2."""
    parts = without(arguments("m", "d", "out", "--epochs", "1"), "--steps")
    options = FinetuneOptions.of(command_parser().parse_args(parts))
    steps = [replace(options, epochs=epochs).steps_of(9) for epochs in (0.1, 0.5, 1.0, 2.0, None)]
    assert steps == [1, 3, 5, 9, 40]
    rows = [{"prompt": "count ", "completion": "one two"} for _ in range(10)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    parts = without(arguments(model, data, tmp_path / "out", "--epochs", "0.5", "--json"), "--steps")
    assert main(parts) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["steps"]) == report["options"]["steps"] == 3
    assert "--epochs" in refused(capsys, *parts, "--steps", "3")


def test_best_step_is_kept_and_reported(capsys, monkeypatch, model, text, tmp_path):
    """The evaluations after step 2 are made worse than they are."""
    from qlora_kernels.cli import finetune_training

    measured = []

    def worse_and_worse(*parts, **keywords):
        measured.append(perplexity(*parts, **keywords).value)
        return Perplexity(measured[-1] + 100 * (len(measured) > 2), 1)

    monkeypatch.setattr(finetune_training, "perplexity", worse_and_worse)
    assert main(arguments(model, text, tmp_path, "--eval-every", "1", "--patience", "2")) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [record["step"] for record in report["evaluations"]] == [1, 2, 3, 4]
    assert report["best"]["step"] == 2
    assert report["perplexity"]["NF4 + adapter, trained"] == measured[1] == report["best"]["perplexity"]
    assert report["perplexity"]["NF4 + adapter, reloaded"] == measured[1]
    why = "step 2 has the lowest value .* of 4 evaluations; training stopped at step 4, after 2 without a lower one"
    assert re.search(f"adapter  .*of step 2: {why}", capsys.readouterr().out)


def test_signal_writes_checkpoint_and_prints_resume_command(capsys, monkeypatch, model, text, tmp_path):
    """No option asks for checkpoints. The printed command continues the run to the same figures."""
    number = signal.SIGTERM
    options = ["--dropout", "0.1", "--eval-every", "2"]
    whole = finetune(capsys, model, text, tmp_path / "whole", *options)
    assert not (tmp_path / "whole" / "checkpoints").exists()
    out = tmp_path / "out"
    from qlora_kernels.cli import finetune_training

    on_step = finetune_training.TrainingStage._on_step

    def kill(self, step):
        on_step(self, step)
        if step.step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_training.TrainingStage, "_on_step", kill)
        before = signal.getsignal(number)
        assert main([*arguments(model, text, out, *options), "--json"]) == 128 + number
        assert signal.getsignal(number) is before
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last == (
        f"qlora-kernels finetune: stopped by {signal.Signals(number).name} after step 3 of 6; continue with: "
        f"qlora-kernels finetune --config {out}/run.yaml --resume"
    )
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
    assert main(["finetune", "--config", str(out / "run.yaml"), "--resume", "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert losses(resumed) == losses(whole)
    for key in ("perplexity", "evaluations", "best"):
        assert resumed[key] == whole[key]
    assert not (out / "checkpoints").exists()


def test_a_signal_after_training_loses_no_step(capsys, monkeypatch, model, text, tmp_path):
    from qlora_kernels.cli import finetune as module

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_adapter", interrupt)
        assert main(arguments(model, text, tmp_path)) == 130
    assert "stopped; continue with: qlora-kernels finetune --config" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "step-00000006.safetensors").is_file()
    steps = []
    monkeypatch.setattr("qlora_kernels.training.loop._step", lambda *parts: steps.append(parts))
    report = finetune(capsys, model, text, tmp_path, "--resume")
    assert (len(report["steps"]), steps) == (6, [])


@pytest.fixture
def interrupts():
    """The tests may have been started with SIGINT ignored, as a shell does for jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_signal_ends_at_once(interrupts):
    with deferred("stops later") as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert (interrupt(), interrupt.name, interrupt.exit_code) == (True, "SIGINT", 130)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred("never") as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert not interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_runs_checkpoints_are_never_deleted_unasked(capsys, model, text, tmp_path):
    finetune(capsys, model, text, tmp_path, "--checkpoint-every", "4")
    before = files_of(tmp_path)
    line = refused(capsys, *arguments(model, text, tmp_path, "--checkpoint-every", "4"))
    assert "must hold no other run's checkpoints; use --resume to continue that run, --overwrite to delete" in line
    assert files_of(tmp_path) == before
    assert len(finetune(capsys, model, text, tmp_path, "--overwrite", "--steps", "4")["steps"]) == 4
    assert not (tmp_path / "checkpoints").exists()


def test_the_recipe_of_a_run_repeats_it(capsys, model, text, tmp_path):
    options = ["--method", "adalora", "--set", "tinit=1", "--set", "tfinal=2", "--dropout", "0.1", "--no-double-quant"]
    options += ["--target-modules", "q_proj,v_proj", "--prompt", "- the: #quick\n", "--gradient-checkpointing"]
    first = finetune(capsys, model, text, tmp_path / "a", *options)
    recipe = tmp_path / "a" / "run.yaml"
    values = yaml.safe_load(recipe.read_text())
    assert values["set"] == {"tinit": 1, "tfinal": 2}
    assert values["double-quant"] is False
    assert main(["finetune", "--config", str(recipe), "--out", str(tmp_path / "b"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for key in ("options", "perplexity", "sample", "rows"):
        assert again[key] == first[key]
    assert losses(again) == losses(first)
    other = yaml.safe_load((tmp_path / "b" / "run.yaml").read_text())
    assert {key for key in values if values[key] != other[key]} == {"out"}


@pytest.mark.parametrize(
    "name", ["d\u00e9", "d\udcc3\udca9", "d\udce9", "a\nlr: 1"], ids=["utf-8", "ascii-locale", "latin-1", "line"]
)
def test_recipe_with_any_folder_name(name, tmp_path, monkeypatch):
    """Bytes of a name that the locale cannot decode are surrogates in Python, which no UTF-8 file can hold."""
    monkeypatch.setattr(Path, "cwd", lambda: Path("/", name))
    parsed = command_parser().parse_args(arguments(name, "data", "out"))
    write_recipe(tmp_path / "run.yaml", parsed, parsed.parser)
    values = read_recipe(tmp_path / "run.yaml")
    assert (values["model"], values["lr"]) == (name, 1e-2)


def test_recipes_are_checked_and_overridden(capsys, model, text, tmp_path):
    path = tmp_path / "run.yaml"
    base = {"model": str(model), "data": str(text), "out": str(tmp_path / "out"), "seq_len": 32, "max-new-tokens": 0}
    base |= {"r": 4, "batch": 2, "epochs": 1, "lr": "1e-2", "fuse": True, "track": [], "cache": None}
    path.write_text(yaml.safe_dump(base))
    assert main(["finetune", "--json", "--config", str(path), "--steps", "2", "--no-fuse", "--lr=1e-3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (len(report["steps"]), report["options"]["lr"], report["fused"]) == (2, 1e-3, 0)

    def line(text):
        path.write_text(text)
        return refused(capsys, "finetune", "--config", path)

    assert "run.yaml: must hold options of qlora-kernels finetune, got 'learning-rate'" in line("learning-rate: 1")
    assert "got 'stepz'; did you mean one of ['steps'" in line("stepz: 4")
    assert "fuse must be true or false, got 'maybe'" in line("fuse: maybe")
    assert "lr must be a number, a string or a list of them, got True" in line("lr: yes")
    assert "must hold options by name" in line("- lr")
    assert "must be a YAML file" in line("{")
    assert "run.yaml:1: must hold 'lr' once" in line("lr: 1\nlr: 2")
    assert "argument --steps: must be >= 1, got 0" in line("steps: 0")
    assert "set must be fields and values, or a list of FIELD=VALUE, got 3" in line("set: 3")
    assert "must be a YAML file" in refused(capsys, "finetune", "--config", tmp_path / "absent.yaml")
    assert "--config" in refused(capsys, "finetune", "--config")


class Tracker(types.ModuleType):
    """Stands for wandb and trackio, whose runs have the same two methods; tests/cli/test_trackers.py runs them."""

    def __init__(self, name, fails=False):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name, origin=f"{name}.py")
        self.calls, self.fails = [], fails

    def init(self, **keywords):
        self.calls.append(("init", keywords))
        return self

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("the network\nis down")
        self.calls.append((step, values))

    def finish(self):
        self.calls.append(("finish", None))


def test_trackers_get_every_figure(capsys, monkeypatch, model, text, tmp_path):
    wandb, trackio = Tracker("wandb"), Tracker("trackio", fails=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    with pytest.warns(UserWarning, match="--track trackio failed and is left out: the network is down"):
        report = finetune(capsys, model, text, tmp_path, "--track", "wandb,trackio", "--eval-every", "3")
    (_, started), *logged, last = wandb.calls
    assert (started["project"], started["name"], started["dir"]) == ("qlora_kernels", tmp_path.name, str(tmp_path))
    assert started["config"]["r"] == 4
    assert last == ("finish", None)
    assert [values["train/loss"] for _, values in logged if "train/loss" in values] == [
        step["loss"] for step in report["steps"]
    ]
    assert [(step, v["eval/perplexity"]) for step, v in logged if "eval/perplexity" in v] == [
        (record["step"], record["perplexity"]) for record in report["evaluations"]
    ]
    assert [call for call, _ in trackio.calls] == ["init"]


def test_errors_known_at_start_are_raised_there(capsys, monkeypatch, model, text, tmp_path):
    def line(*more):
        return refused(capsys, *arguments(model, text, tmp_path / "out", *more))

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert "--track wandb: wandb must be installed; run `pip install wandb`" in line("--track", "wandb")
    assert "--track: must be of tensorboard, wandb, trackio, got 'mlflow'" in line("--track", "mlflow")
    assert "--patience: must come with --eval-every" in line("--patience", "2")
    assert "--eval-every: must have unseen text" in line("--eval-every", "2", "--unseen", "0")
    assert "--epochs: must be finite and > 0, got 0" in line("--epochs", "0")
    assert not (tmp_path / "out").exists()
