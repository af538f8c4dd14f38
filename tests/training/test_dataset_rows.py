"""Data through Hugging Face's `datasets`: the rows are those of the JSON lines that they were made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_kernels.training import Chat, DataError, Plain, is_dataset, read_corpus, read_data

datasets = pytest.importorskip("datasets")

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
ROWS = [
    {"text": "one", "id": 1},
    {"text": "two", "id": 2},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "assistant", "content": "yo"},
        ]
    },
    {"prompt": "2 + 2 =", "completion": " 4"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One dataset in every form."""
    folder = tmp_path_factory.mktemp("made")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    lines = folder / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    keys = dict.fromkeys(key for row in ROWS for key in row)
    dataset = datasets.Dataset.from_list([{key: row.get(key) for key in keys} for row in ROWS])
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0, 1])}).save_to_disk(folder / "splits")
    for name, suffix in (("jsonl", "jsonl"), ("parquet", "parquet")):
        (folder / f"{name}_folder").mkdir()
        shutil.copy(folder / f"rows.{suffix}", folder / f"{name}_folder" / f"train.{suffix}")
    shutil.copy(next((folder / "saved").glob("*.arrow")), folder / "rows.arrow")
    yield folder
    patch.undo()


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "saved", "splits", "parquet_folder", "jsonl_folder"])
def test_every_form_gives_the_rows_of_the_json_lines(made, name):
    assert is_dataset(str(made / name))
    expected = read_corpus(made / "rows.jsonl", 0)
    corpus = read_data(str(made / name), 0)
    assert corpus.train == expected.train
    assert corpus.unused == ("id",)
    chat = corpus.train[2]
    assert isinstance(chat, Chat)
    assert "content" not in chat.messages[1]
    assert chat.place.startswith(str(made / name))
    assert chat.place.endswith(": row 3")


def test_split_is_chosen_by_name_and_wrong_ones_are_refused(made):
    assert read_data(str(made / "splits"), 0, "test").train == (Plain("one"), Plain("two"))
    with pytest.raises(DataError, match=r"--split must name one of \['train', 'test'\], got dev"):
        read_data(str(made / "splits"), 0, "dev")
    with pytest.raises(DataError, match="must have splits for --split test"):
        read_data(str(made / "saved"), 0, "test")
    with pytest.raises(DataError, match="must be a dataset with splits for --split test, got one file"):
        read_data(str(made / "rows.jsonl"), 0, "test")


@pytest.mark.parametrize("names", [("test", "train"), ("test",), ("test", "dev")], ids=",".join)
def test_default_split_is_train_or_the_only_one(names, tmp_path):
    rows = {name: datasets.Dataset.from_list([{"text": name}]) for name in names}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "splits")
    if names == ("test", "dev"):
        with pytest.raises(DataError, match=r"--split must name one of \['test', 'dev'\], got none"):
            read_data(str(tmp_path / "splits"), 0)
    else:
        assert read_data(str(tmp_path / "splits"), 0).train == (Plain(names[-1]),)


def test_plain_files_are_read_without_datasets(made, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert not is_dataset(str(made / "rows.jsonl"))
    assert not is_dataset("no/such.txt")
    assert len(read_data(str(made / "rows.jsonl"), 0).train) == 4
    with pytest.raises(ModuleNotFoundError):
        read_data(str(made / "rows.parquet"), 0)


def test_unwritable_cache_of_datasets_is_named(made, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "/nonexistent")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="set HF_HOME to a writable folder"):
        read_data(str(made / "rows.parquet"), 0)


def test_unreadable_data_is_refused(made, tmp_path):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes((made / "rows.parquet").read_bytes()[:-40])
    with pytest.raises(DataError, match=r"damaged\.parquet: must be readable by `datasets`"):
        read_data(str(damaged), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: must be readable by `datasets`"):
        read_data(str(tmp_path / "empty"), 0)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="must not be a folder of texts"):
        read_data(str(texts), 0)
    with pytest.raises(DataError, match="owner/none: must be readable by `datasets`"):
        read_data("owner/none", 0)
    preferences = tmp_path / "dpo.parquet"
    datasets.Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}]).to_parquet(preferences)
    with pytest.raises(DataError, match=r"dpo\.parquet\[train\]: row 1: must not be a preference"):
        read_data(str(preferences), 0)


def test_hub_dataset_is_read_from_local_cache(made, monkeypatch):
    """The layout in which `datasets` keeps what it has prepared; nothing is downloaded here."""
    # Other tests have prepared files of their own in this cache.
    loaded = datasets.load_dataset("parquet", data_files=str(made / "rows.parquet"))
    prepared = Path(loaded["train"].cache_files[0]["filename"]).parent
    cached = made / "cache" / "owner___chats" / "default" / "0.0.0" / "0123456789abcdef"
    shutil.copytree(prepared, cached)
    for file in cached.glob("parquet-train*"):
        file.rename(cached / file.name.replace("parquet", "chats"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    corpus = read_data("owner/chats", 0)
    assert corpus.train == read_corpus(made / "rows.jsonl", 0).train
    assert corpus.train[0].place == "owner/chats[train]: row 1"
