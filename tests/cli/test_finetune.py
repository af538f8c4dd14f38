"""The finetune command on a tiny model: its output, repeatability, exact resumption, and refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_kernels.cli import main
from qlora_kernels.cli.methods import METHODS
from qlora_kernels.io.locks import held_alone
from tests.support.tiny_model import LINEARS, write_jsonl, write_tiny_llama

from .finetune_runs import arguments, files_of, finetune, losses, refused

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def test_whole_command(capsys, model, text, tmp_path):
    assert main(arguments(model, text, tmp_path, "--dropout", "0.1")) == 0
    captured = capsys.readouterr()
    for line in ("16-bit base", "NF4 base", "NF4 + adapter, trained", "trained parameters", "tokens/s", "continuation"):
        assert line in captured.out
    report = json.loads((tmp_path / "report.json").read_text())
    perplexity = report["perplexity"]
    assert perplexity["NF4 + adapter, reloaded"] == perplexity["NF4 + adapter, trained"] < perplexity["NF4 base"]
    assert report["layers"] == LINEARS
    assert 3.7 < report["bytes_dense"] / report["bytes_nf4"] < 3.9
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "cache", "loss.png", "report.json", "run.yaml"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    again = finetune(capsys, model, text, tmp_path, "--dropout", "0.1")
    assert losses(again) == losses(report)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    other = finetune(capsys, model, text, tmp_path, "--dropout", "0.1", "--seed", "1")
    assert losses(other) != losses(report)


def test_adapter_loads_in_peft(capsys, model, text, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    report = finetune(capsys, model, text, tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32.0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * LINEARS
    assert sum(t.numel() for t in tensors.values()) == report["trainable"]
    assert any(p.abs().max() > 0 for n, p in loaded.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "paged_adamw", "--schedule", "linear"],
        ["--gradient-checkpointing", "--micro-batch", "1"],
        ["--compute-dtype", "fp32", "--blocksize", "128", "--no-double-quant"],
        ["--target-modules", "q_proj,v_proj", "--skip", "lm_head,down_proj", "--prompt", "the"],
        ["--eval-windows", "0", "--max-new-tokens", "0"],
    ],
    ids=lambda options: options[0].strip("-"),
)
def test_options(capsys, model, text, tmp_path, options):
    report = finetune(capsys, model, text, tmp_path, *options)
    assert len(report["steps"]) == 6
    assert report["layers"] == (LINEARS - 2 if "--skip" in options else LINEARS)
    if "--eval-windows" not in options:
        assert report["perplexity"]["NF4 + adapter, trained"] < report["perplexity"]["NF4 base"]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_every_method_runs_and_resumes(capsys, model, text, tmp_path, method):
    """Resumption from a middle checkpoint gives the same losses and perplexity; training/test_resume.py has more."""
    options = ["--method", method, "--checkpoint-every", "4"]
    options += ["--set", "add_missing=true"] if method == "bitfit" else []
    whole = finetune(capsys, model, text, tmp_path, *options)
    assert whole["trainable"] > 0
    assert len(set(losses(whole))) == 6
    (tmp_path / "report.json").unlink()
    (tmp_path / "checkpoints" / "step-00000006.safetensors").unlink()
    resumed = finetune(capsys, model, text, tmp_path, *options, "--resume")
    assert losses(resumed) == losses(whole)
    assert resumed["perplexity"] == whole["perplexity"]


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_finished_run_is_not_changed(capsys, model, text, tmp_path, method):
    options = ["--method", method, "--checkpoint-every", "4"]
    whole = finetune(capsys, model, text, tmp_path, *options)
    before = files_of(tmp_path)
    assert finetune(capsys, model, text, tmp_path, *options, "--resume") == whole
    assert files_of(tmp_path) == before
    # Without the report, it continues from the last checkpoint, that of the last step, and gives the same adapter.
    (tmp_path / "report.json").unlink()
    again = finetune(capsys, model, text, tmp_path, *options, "--resume")
    assert losses(again) == losses(whole)
    assert again["perplexity"] == whole["perplexity"]
    after = files_of(tmp_path)
    kept = [name for name in before if name.startswith(("adapter", "cache", "checkpoints"))]
    assert [name for name in kept if after[name] != before[name]] == []
    # A damaged adapter is incomplete and is made again.
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(before["adapter/adapter_model.safetensors"][:-1])
    finetune(capsys, model, text, tmp_path, *options, "--resume")
    assert files_of(tmp_path)["adapter/adapter_model.safetensors"] == before["adapter/adapter_model.safetensors"]
    changed = main(arguments(model, text, tmp_path, *options, "--resume", "--max-new-tokens", "5"))
    assert changed == 0
    assert "finished already" not in capsys.readouterr().err


def test_resume_without_checkpoint_is_reported(capsys, model, text, tmp_path):
    report = finetune(capsys, model, text, tmp_path, "--resume")
    assert any("nothing to resume" in note for note in report["notes"])
    assert len(report["steps"]) == 6


def test_damaged_checkpoint_loses_only_its_steps(capsys, model, text, tmp_path):
    options = ["--checkpoint-every", "2"]
    whole = finetune(capsys, model, text, tmp_path, *options)
    (tmp_path / "report.json").unlink()
    newest = tmp_path / "checkpoints" / "step-00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="step-00000006.*loading the previous checkpoint"):
        resumed = finetune(capsys, model, text, tmp_path, *options, "--resume")
    assert losses(resumed) == losses(whole)


def test_a_second_run_into_the_same_folder_is_refused(capsys, model, text, tmp_path):
    pytest.importorskip("fcntl")
    with held_alone(tmp_path) as alone:
        assert alone
        assert "another run is writing to it" in refused(capsys, *arguments(model, text, tmp_path))
    assert not list(tmp_path.iterdir())


def test_refused_run_deletes_nothing(capsys, model, text, tmp_path):
    finetune(capsys, model, text, tmp_path, "--checkpoint-every", "4")
    before = files_of(tmp_path)
    assert main(arguments(model, "no/such.txt", tmp_path)) == 2
    assert files_of(tmp_path) == before


def test_gradient_checkpointing_changes_no_gradient(capsys, model, text, tmp_path):
    plain = finetune(capsys, model, text, tmp_path, "--dropout", "0.1")
    checkpointed = finetune(capsys, model, text, tmp_path, "--dropout", "0.1", "--gradient-checkpointing")
    assert losses(checkpointed) == losses(plain)


def test_records_with_completions(capsys, model, tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    records = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)] + [{"messages": chat}] * 6
    data = write_jsonl(tmp_path / "data.jsonl", records)
    report = finetune(capsys, model, data, tmp_path / "out")
    assert report["predictions"] < 4 * 16
    assert report["perplexity"]["NF4 + adapter, trained"] < report["perplexity"]["NF4 base"]


def test_nf4_folder_is_used_unchanged(capsys, model, text, tmp_path):
    assert main(["quantize", str(model), str(tmp_path / "nf4")]) == 0
    capsys.readouterr()
    direct = finetune(capsys, model, text, tmp_path / "a")
    stored = finetune(capsys, tmp_path / "nf4", text, tmp_path / "b")
    assert losses(stored) == losses(direct)
    assert "16-bit base" not in stored["perplexity"]
    assert not (tmp_path / "b" / "cache").exists()


KILLED_RUN = """
import os, signal, sys
from qlora_kernels.cli import main
replace = os.replace
def replace_and_die(source, target):
    replace(source, target)
    if "step-00000004" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
main()
"""
"""The command, killed when its second checkpoint is published."""


def test_killed_and_resumed_is_the_same_run(capsys, model, text, tmp_path):
    options = ["--dropout", "0.1", "--checkpoint-every", "2", "--steps", "24", "--optimizer", "paged_adamw"]
    whole = finetune(capsys, model, text, tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUN, *arguments(model, text, killed, *options)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert not (killed / "report.json").exists()
    assert list((killed / "checkpoints").glob("step-*.safetensors"))
    resumed = finetune(capsys, model, text, killed, *options, "--resume")
    assert losses(resumed) == losses(whole)
    assert resumed["perplexity"] == whole["perplexity"]
    for name, tensor in load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(killed / "adapter" / "adapter_model.safetensors")[name]), name


@pytest.mark.parametrize(("unseen", "measured"), [("0", False), ("0.9", True)])
def test_unseen_fractions(capsys, model, tmp_path, unseen, measured):
    rows = [{"prompt": "count ", "completion": "one two", "id": i} for i in range(20)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = finetune(capsys, model, data, tmp_path, "--unseen", unseen, "--eval-windows", "99")
    assert len(report["steps"]) == 6
    predictions_of_a_row = len("one two") + 1
    assert report["predictions"] == (18 * predictions_of_a_row if measured else 0)
    assert ("NF4 + adapter, reloaded" in report["perplexity"]) == measured
    assert "keys of the data that are not used: id" in report["notes"]
    assert any("no perplexity is measured" in note for note in report["notes"]) != measured


def test_dropped_and_cut_rows_are_reported(capsys, model, tmp_path):
    rows = [
        {"prompt": "x" * (40 if i % 10 in (3, 4, 5) else 1), "completion": "y" * (40 if i % 10 == 6 else 1)}
        for i in range(40)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = finetune(capsys, model, data, tmp_path)
    counts = {"context_turns": 0, "straddling": 0}
    dropped = {"no learned token within 32 tokens": 12}
    assert report["rows"] == {
        "train": {"kept": 20, "cut": 4, "dropped": dropped, **counts},
        "unseen": {"kept": 4, "cut": 0, "dropped": {}, **counts},
    }
    assert main(arguments(model, data, tmp_path)) == 0
    captured = capsys.readouterr()
    line = "36 rows: 20 whole, 4 cut, 12 dropped (no learned token within 32 tokens)"
    assert line in captured.out
    assert line in captured.err


def test_refusal_of_the_chat_template_names_the_record(capsys, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = folder / "chat_template.jinja"
    template.write_text(refusing + template.read_text())
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = (
        [{"messages": chat}] * 12
        + [{"messages": [{"role": "system", "content": "s"}, *chat]}]
        + [{"messages": chat}] * 7
    )
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = refused(capsys, *arguments(folder, data, tmp_path / "out"))
    assert f"{data}:13: the chat template refuses the conversation: no system role" in line


def test_bad_files_are_refused(capsys, model, text, tmp_path):
    def line(data, *more, out=tmp_path / "out", base=model):
        return refused(capsys, *arguments(base, data, out, *more))

    assert "no/such.txt" in line("no/such.txt")
    assert 'or "builtin", got a path that does not exist' in line(text, base="no/such/model")
    assert "must be a model folder, with config.json" in line(text, base=tmp_path)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty.txt: must hold text, got an empty file" in line(empty)
    short = tmp_path / "short.txt"
    short.write_text("word")
    assert "short.txt: must be long enough to keep a part unseen" in line(short)
    short.write_text("a few words too few " * 2)
    assert "short.txt: must fill a window of 64 tokens, got" in line(short, "--seq-len", "64")
    short.write_text("words " * 40)
    assert "short.txt (its unseen part): must fill a window of 32 tokens, got 2" in line(short)
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"text": "x"}, {"wrong": "y"}])
    assert "broken.jsonl:2: must hold" in line(broken)
    (tmp_path / "file").touch()
    assert "file" in line(text, out=tmp_path / "file" / "out")
    assert "skip: 'lm_haed' matches no linear layer; did you mean one of ['lm_head'" in line(text, "--skip", "lm_haed")
    assert "q_prj" in line(text, "--target-modules", "q_prj")


def test_bad_options_are_refused(capsys, model, text, tmp_path):
    def line(*more):
        return refused(capsys, *arguments(model, text, tmp_path, *more))

    assert "--steps: must be >= 1, got 0" in line("--steps", "0")
    assert "--dropout: must be in [0, 1), got 1" in line("--dropout", "1")
    assert "--lr" in line("--lr", "fast")
    assert "--blocksize" in line("--blocksize", "100")
    assert "--method" in line("--method", "magic")
    assert "lora has no field 'lora_dropot'; did you mean one of ['lora_dropout'" in line("--set", "lora_dropot=0.5")
    assert "--set" in line("--set", "novalue")
    assert "COMMAND" in refused(capsys)
    finetune(capsys, model, text, tmp_path, "--checkpoint-every", "3")
    assert "another r (4 -> 8)" in line("--r", "8", "--resume")


def test_diverging_ends_with_1(capsys, model, text, tmp_path):
    assert main(arguments(model, text, tmp_path, "--lr", "1e30", "--clip", "0")) == 1
    assert "must be finite" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
    assert not Path(tmp_path / "report.json").exists()


def test_fused_parts(capsys, model, text, tmp_path):
    """Two layers, the last norm and the output head are fused; losses differ from the plain model's by roundings."""
    plain, fused = (
        finetune(capsys, model, text, tmp_path / name, *more) for name, more in (("a", []), ("b", ["--fuse"]))
    )
    assert (plain["fused"], fused["fused"]) == (0, 12)
    assert fused["options"]["fuse"]
    assert "fuse" not in plain["options"]
    for a, b in zip(losses(plain), losses(fused), strict=True):
        assert a == pytest.approx(b, rel=0.05)
