"""The Python blocks of the documentation run, and the commands in its shell blocks exist.

Not run: blocks titled "excerpt of FOLDER", whose code needs several processes or the emulator of CUDA kernels. The
tests in FOLDER run the same calls.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.cli import main
from qlora_kernels.cli.main import command_parser
from qlora_kernels.peft import METHODS
from tests.support.tiny_model import write_jsonl, write_tiny_llama

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {
    "docs/huggingface.md": ("accelerate", "bitsandbytes", "datasets", "trl"),
    "docs/tutorials/finetune-gpu.md": ("accelerate", "datasets", "trl"),
    "README.md": ("accelerate", "datasets", "trl"),
}
"""Page -> libraries that its blocks import in addition to transformers and PEFT."""
GIVEN_A_MODEL = ("docs/methods.md", "docs/finetune.md", "docs/fuse_model.md", "docs/paging.md")
"""Pages whose first block begins with the reader's own model."""

LANGUAGES = {"python", "bash", "text", "json", "yaml"}
EXCERPTS = ("tests/cuda", "tests/distributed")
"""Folders that excerpts may name: their tests need processes or a compiler of their own."""

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return (line number, text) of the page's fenced blocks in `language`, without excerpts."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in found if 'title="excerpt of' not in match[1]]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def methods_as_before() -> Iterator[None]:
    """Restore the registered methods after a page that registers one, because other tests iterate over them."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def model_for(page: Path) -> dict[str, object]:
    """Return the variables that the first block of a page takes for granted: a model, and batches of it."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = torch.randint(64, (2, 8))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    if name(page) == "docs/methods.md":
        classifier = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4))
        batch = {"input_ids": tokens, "labels": torch.tensor([0, 1])}
        return {"qk": qk, "torch": torch, "model": classifier, "batches": [batch, batch]}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    qk.replace_linear(model)
    return {"qk": qk, "model": model}


def write_recipe_files(folder: Path) -> None:
    """Write the model and the data that the recipes of README.md name."""
    write_tiny_llama(folder / "my-model", dtype=torch.float32)
    rows = [{"text": f"Once there were {number} foxes and a lazy dog. " * 8} for number in range(24)]
    write_jsonl(folder / "my-data.jsonl", rows)


@pytest.mark.usefixtures("methods_as_before")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, as one program, in an empty folder; README.md names some files."""
    for library in NEEDS.get(name(page), ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    if name(page) == "README.md":
        write_recipe_files(tmp_path)
    namespace = {"__name__": "__main__"} | (model_for(page) if name(page) in GIVEN_A_MODEL else {})
    for line, text in blocks(page, "python"):
        padded = "\n" * line + text  # so that a traceback has the page's line numbers
        exec(compile(padded, str(page), "exec", dont_inherit=True), namespace)


def test_shell_recipes_run(tmp_path, monkeypatch, capsys):
    """The commands of README.md exit with 0, in their order."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    write_recipe_files(tmp_path)
    (_, text), *_ = [block for block in blocks(ROOT / "README.md", "bash") if "qlora-kernels" in block[1]]
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    assert [command[1] for command in commands][:3] == ["finetune", "generate", "export"]
    for command in commands:
        assert main(command[1:]) == 0, capsys.readouterr().err
    assert Path("my-model.gguf").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name)
def test_shell_blocks_use_existing_commands_and_paths(page):
    """Commands of this package parse, make targets are in the Makefile, and pytest paths exist."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line, text in blocks(page, "bash"):
        for command in text.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
            where = f"{name(page)}:{line}: {command}"
            program = words[words.index("-m") + 1 :] if "-m" in words else words
            if program[:1] in (["qlora-kernels"], ["qlora_kernels.cli"]) and program[1:2] != ["bench"]:
                command_parser().parse_args(program[1:])  # exits, with a message, where it cannot
            elif words[:1] == ["make"]:
                assert set(words[1:]) <= targets, where
            elif words[:3] == ["python", "-m", "pytest"]:
                assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/")), where
            elif words[:2] == ["python", "-m"]:
                assert find_spec(words[2]), where


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_language_that_is_checked(page):
    """No block escapes the tests above by its language, its indentation or its title."""
    opening = True
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if not (fence := re.match(r"(\s*)(```|~~~)(\w*) ?(.*)", line)):
            continue
        indent, marks, language, title = fence.groups()
        where = f"{name(page)}:{number}: {line}"
        assert (indent, marks) == ("", "```"), where
        if opening:
            assert language in LANGUAGES, where
            excerpt = re.fullmatch(r'title="excerpt of ([\w/]+)"', title)
            assert not title or (excerpt and excerpt[1] in EXCERPTS), where
        opening = not opening


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/methods.md"])
def test_a_broken_block_is_found(page, tmp_path):
    planted = tmp_path / "page.md"
    planted.write_text(
        (ROOT / page).read_text() + "\n```python\nraise RuntimeError\n```\n\n```bash\nmake nothing\n```\n"
    )
    assert blocks(planted, "python")[-1][1] == "raise RuntimeError\n"
    assert blocks(planted, "bash")[-1][1] == "make nothing\n"
    assert len(blocks(planted, "python")) == len(blocks(ROOT / page, "python")) + 1
