"""plan: the sizes of real models without their weights, GPUs, and refusals."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_kernels.cli import main
from qlora_kernels.integrations.model_folders import load_model
from qlora_kernels.integrations.planned_model import USUAL_SIZES, planned_model
from tests.support.tiny_model import LINEARS, write_tiny_llama

PARAMETERS = {"1B": 1.236e9, "7B": 6.738e9, "8B": 8.030e9, "70B": 70.554e9}


def plan(capsys, *arguments, code=0) -> dict:
    assert main(["plan", "--json", *map(str, arguments)]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("size", PARAMETERS)
def test_usual_sizes_are_those_of_published_models(size):
    model, quantized, adapted = planned_model(size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[size], rel=1e-3)
    assert quantized == adapted
    assert len(quantized) == 7 * model.config.num_hidden_layers
    assert next(model.parameters()).is_meta


def test_every_usual_size_is_planned(capsys):
    totals = [plan(capsys, "--model", size.lower())["total"] for size in USUAL_SIZES]
    assert totals == sorted(totals)


def test_weights_are_those_of_the_loaded_model(capsys, tmp_path):
    folder = write_tiny_llama(tmp_path / "model")
    assert main(["quantize", str(folder), str(tmp_path / "nf4")]) == 0
    capsys.readouterr()
    model = load_model(tmp_path / "nf4", torch.bfloat16)
    held = {t.untyped_storage()._cdata: t.nbytes for t in [*model.parameters(), *model.buffers()]}
    for source in (folder, tmp_path / "nf4"):
        values = plan(capsys, "--model", source, "--rank", 4)
        assert values["weights"] == sum(held.values())
    (folder / "model.safetensors").unlink()  # only shapes are read
    skipping = plan(capsys, "--model", folder, "--rank", 4, "--skip", "lm_head,down_proj")
    assert skipping["nf4"] < values["nf4"]
    assert skipping["adapters"] == values["adapters"], "a dense layer gets an update too"
    assert LINEARS


def test_cards_fit_up_to_their_longest_sequence(capsys):
    values = plan(capsys, "--model", "7B", "--seq", 1024)
    assert [card["memory"] for card in values["cards"]] == [n * 10**9 for n in (8, 16, 24, 48, 80)]
    assert [card["fits"] for card in values["cards"]] == [False, True, True, True, True]
    assert values["cards"][0]["fits_checkpointed"]
    longest = values["cards"][1]["longest_seq"]
    assert plan(capsys, "--model", "7B", "--seq", longest, "--device", "16GB")["cards"][0]["fits"]
    assert not plan(capsys, "--model", "7B", "--seq", longest + 1, "--device", "16GB", code=1)["cards"][0]["fits"]
    assert plan(capsys, "--model", "7B", "--device", "16GiB")["cards"][0]["memory"] == 16 << 30
    assert not plan(capsys, "--model", "70B", "--device", "24GB", code=1)["cards"][0]["longest_seq"]


def test_table_lists_each_part_of_the_memory(capsys):
    assert main(["plan", "--model", "7B", "--seq", "1024", "--optimizer", "paged_adamw"]) == 0
    text = capsys.readouterr().out
    for line in ("weights, NF4 layers", "optimizer (pageable, not in the sum)", "activations of 1,024 tokens"):
        assert line in text
    assert "8.0 GB  fits with --gradient-checkpointing" in text
    assert "longest --seq" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "9B"], "9B: must be an existing path or a model in the Hugging Face cache"),
        (["--model", "no/such/folder"], "got a path that does not exist"),
        (["--model", "7B", "--skip", "q_prj"], "matches no linear layer; did you mean"),
    ],
)
def test_refused(capsys, monkeypatch, options, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("device", ["24 apples", "0GB", "GB", "-1GB"])
def test_memory_of_a_device_must_be_a_size(capsys, device):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--model", "7B", f"--device={device}"])
    assert "must be a size such as 24GB" in capsys.readouterr().err
