"""Code in a model folder is never run, and no question about it is asked."""

from __future__ import annotations

import json
import shutil

import pytest

from qlora_kernels.cli import main
from qlora_kernels.integrations.transformers import ModelError, linear_layers, load_model, load_tokenizer
from tests.support.tiny_model import write_tiny_llama

CODE = "open({mark!r}, 'w').close()\nclass Custom: pass\n"


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    questions = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "y")
    yield
    assert not questions


def add_code(folder, config_file, auto_map, **values):
    """Name custom classes in one JSON file of the folder, and return the file that their code would create."""
    mark = folder / "code_was_run"
    (folder / "custom.py").write_text(CODE.format(mark=str(mark)))
    path = folder / config_file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **values, "auto_map": auto_map}))
    return mark


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def custom(tmp_path):
    """A folder with a model type that only its own code implements."""
    folder = tmp_path / "custom"
    folder.mkdir()
    auto_map = {"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.Custom"}
    mark = add_code(folder, "config.json", auto_map, model_type="custom")
    add_code(folder, "tokenizer_config.json", {"AutoTokenizer": ["custom.Custom", None]}, tokenizer_class="Custom")
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    yield folder
    assert not mark.exists()


@pytest.mark.parametrize("load", [load_model, load_tokenizer, linear_layers])
def test_custom_architecture_is_refused(custom, load):
    with pytest.raises(ModelError, match=r"custom: .*") as refusal:
        load(custom)
    assert "trust_remote_code" not in str(refusal.value)


def test_commands_refuse_custom_architectures(custom, tmp_path, capsys):
    assert main(["quantize", str(custom), str(tmp_path / "out")]) == 2
    assert "this folder's own code (auto_map in its JSON files) is never run" in capsys.readouterr().err
    generate = ["generate", "--model", str(custom), "--prompt", "x"]
    assert main([*generate, "--dense"]) == 2
    assert main(generate) == 2


def test_known_architecture_uses_code_of_transformers(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    auto_map = {"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.Custom"}
    mark = add_code(folder, "config.json", auto_map)
    add_code(folder, "tokenizer_config.json", {"AutoTokenizer": ["custom.Custom", None]})
    assert type(load_model(folder)).__name__ == "LlamaForCausalLM"
    assert load_tokenizer(folder)("a")["input_ids"]
    assert not mark.exists()
