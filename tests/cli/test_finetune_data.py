"""`qlora-kernels finetune` on data of `datasets`, and with packed windows."""

from __future__ import annotations

import pytest

from tests.cli.finetune_runs import arguments, finetune, refused
from tests.support.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def test_conversations_of_a_parquet_file_packed(capsys, model, tmp_path):
    datasets = pytest.importorskip("datasets")
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": turns, "id": i} for i in range(20)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chats.parquet")
    capsys.readouterr()  # the bar of to_parquet
    report = finetune(capsys, model, tmp_path / "chats.parquet", tmp_path / "out", "--packing", "--seq-len", "64")
    packed = next(note for note in report["notes"] if note.startswith("packed 18 examples into "))
    assert int(packed.split()[-2]) < 18
    assert report["rows"]["train"]["kept"] == 18
    assert report["options"]["packing"] is True
    assert "keys of the data that are not used: id" in report["notes"]
    assert report["perplexity"]["NF4 + adapter, trained"] < report["perplexity"]["NF4 base"]


def test_unsupported_packing_and_data_are_refused(capsys, monkeypatch, model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    line = refused(capsys, *arguments(model, data, tmp_path / "out", "--packing", "--method", "prompt_tuning"))
    assert "--packing: must come with a method of lora, " in line
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    line = refused(capsys, *arguments(model, tmp_path, tmp_path / "out"))
    assert "datasets must be installed; run `pip install 'qlora_kernels[data]'`" in line
    assert not (tmp_path / "out").exists()
