"""The Python blocks of the documentation run, and the commands in its shell blocks exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return (line number, text) of the page's fenced blocks in `language`.

    A block titled "excerpt of ..." repeats code that runs in the tests it names; it is left out.
    """
    text = page.read_text()
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
    namespace = {"__name__": "__main__"}
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
            if words[:1] == ["qlora-kernels"] and words[1:2] != ["bench"]:
                command_parser().parse_args(words[1:])  # exits, with a message, where it cannot
            elif words[:1] == ["make"]:
                assert set(words[1:]) <= targets, where
            elif words[:3] == ["python", "-m", "pytest"]:
                assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/")), where
