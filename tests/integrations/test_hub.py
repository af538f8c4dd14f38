"""Models by hub id: from a local cache as huggingface_hub lays it out, from a hub that is simulated, or refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from qlora_kernels.cli import main
from qlora_kernels.integrations.hub import hub_folder, is_hub_id
from qlora_kernels.integrations.model_folders import ModelError, load_model, resolve_model
from tests.support.tiny_model import write_tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IN_CACHE = huggingface_hub.snapshot_download


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def download(**wanted):
        return IN_CACHE(**wanted, cache_dir=folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def put(cache: Path, name: str, model: Path, revision: str = "main") -> Path:
    """A model as a snapshot of symbolic links to blobs. Returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    for i, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, repository / "blobs" / str(i))
        os.symlink(Path("..", "..", "blobs", str(i)), snapshot / file.name)
    return snapshot


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("gpt2", True),
        ("owner/model-1.5_b", True),
        ("owner/model@v1.0", True),
        ("a/b/c", False),
        ("/root/model", False),
        ("../model", False),
        ("./model", False),
        ("owner/", False),
        ("", False),
        ("a b/c", False),
        ("~/model", False),
    ],
)
def test_form_of_an_id(name, is_id):
    assert is_hub_id(name) == is_id


def test_commands_take_a_model_from_the_cache(cache, model, tmp_path, capsys, monkeypatch):
    snapshot = put(cache, "owner/tiny", model)
    assert resolve_model("owner/tiny") == snapshot
    assert main(["quantize", "owner/tiny", str(tmp_path / "nf4")]) == 0
    main(["quantize", str(model), str(tmp_path / "local")])
    assert (tmp_path / "nf4" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()
    generate = ["generate", "--prompt", "a", "--max-new-tokens", "3", "--dense", "--model"]
    capsys.readouterr()
    texts = [(main([*generate, name]), capsys.readouterr().out) for name in ("owner/tiny", str(model))]
    assert texts[0] == texts[1]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "owner" / "tiny")
    assert resolve_model("owner/tiny") == Path("owner/tiny"), "a path that exists is a path"


def test_revisions(cache, model):
    snapshot = put(cache, "owner/tiny", model, revision="v2")
    assert hub_folder("owner/tiny@v2") == snapshot
    assert hub_folder(f"owner/tiny@{COMMIT}") == snapshot
    with pytest.raises(ModelError, match="of which no file is in the cache; HF_HUB_OFFLINE is set"):
        hub_folder("owner/tiny")


def test_snapshot_without_weights_is_not_a_model(cache, model):
    snapshot = put(cache, "owner/tiny", model)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"of which model.safetensors is missing; HF_HUB_OFFLINE is set"):
        hub_folder("owner/tiny")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ModelError, match=r"of which model-00002-of-00002.safetensors is missing"):
        hub_folder("owner/tiny")
    (snapshot / "config.json").unlink()
    with pytest.raises(ModelError, match=r"of which config.json is missing"):
        hub_folder("owner/tiny")


def test_model_missing_from_cache_gives_one_line_error(cache, capsys):
    for command in (["quantize", "owner/none", "x"], ["generate", "--prompt", "a", "--model", "owner/none"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "owner/none: must be an existing path or a model in the Hugging Face cache" in error
        assert "HF_HUB_OFFLINE is set: unset it" in error


def test_files_missing_from_cache_are_downloaded(cache, model, monkeypatch):
    asked = []

    def download(**wanted):
        asked.append(wanted)
        if not wanted.get("local_files_only"):
            put(cache, "owner/tiny", model)
        return IN_CACHE(**{**wanted, "local_files_only": True}, cache_dir=cache)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model(hub_folder("owner/tiny"), torch.float32).config.hidden_size == 64
    assert [call.get("local_files_only", False) for call in asked] == [True, False]
    assert hub_folder("owner/tiny").name == COMMIT
    assert len(asked) == 3, "a whole model in the cache is not asked for again"
    patterns = asked[1]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".py", ".pt", ".pth")) for pattern in patterns)


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012 - of a class of another library
    request = None
    status_code = 404


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("Check your\nconnection"), "the hub is not reached: Check your"),
        (OSError("no route to host"), "no route to host"),
        (RepositoryNotFoundError("404: Repository Not Found\nfor url", response=_Response()), "Repository Not Found"),
    ],
)
def test_unreachable_hub_gives_one_line_error(cache, capsys, monkeypatch, error, words):
    def download(**wanted):
        if wanted.get("local_files_only"):
            raise LocalEntryNotFoundError("none")
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main(["quantize", "owner/none", "x"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert words in line
