"""The command before it imports torch: help, versions, wrong arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_kernels
from qlora_kernels.cli import choices, main, model_source
from qlora_kernels.cli.arguments import dtype_of
from qlora_kernels.cli.methods import METHODS
from qlora_kernels.format import nf4
from qlora_kernels.integrations import gguf_export
from qlora_kernels.training import schedule

SLOW = {"torch", "numpy", "transformers", "accelerate", "datasets", "matplotlib", "yaml", "qlora_kernels._public"}


def test_arguments_are_parsed_without_torch():
    """In one process: help of each command, versions, an unknown option, and then a name of the package."""
    script = f"""
import contextlib, io, sys
sys.argv = ["/usr/bin/qlora-kernels"]
from qlora_kernels.cli.main import main
commands = ["info", "plan", "quality", "quantize", "finetune", "eval", "generate", "chat", "merge", "export"]
for argv in (["--help"], ["--version"], ["finetune", "--no-such"], *([name, "--help"] for name in commands)):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(argv)
        except SystemExit:
            pass
slow = {SLOW!r} & set(sys.modules)
assert not slow, slow
import qlora_kernels
import qlora_kernels.backends
assert callable(qlora_kernels.LinearNF4)
assert isinstance(qlora_kernels.backends(), dict)
try:
    qlora_kernels.nothing
except AttributeError:
    pass
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)


def test_option_choices_equal_module_constants():
    assert (choices.BLOCKSIZES, choices.DEFAULT_BLOCKSIZE) == (nf4.BLOCKSIZES, nf4.DEFAULT_BLOCKSIZE)
    assert choices.SCHEDULES == schedule.SCHEDULES
    assert set(choices.METHODS) == set(METHODS)
    assert set(choices.OUTTYPES) == set(gguf_export.FILE_TYPES)
    assert [dtype_of(name) for name in choices.DTYPES] == [torch.bfloat16, torch.float16, torch.float32]


def test_version(capsys, monkeypatch):
    """The versions are given, because other tests build wheels of this tree, which changes its metadata."""
    monkeypatch.setattr("importlib.metadata.version", {"qlora_kernels": "1.2.3+cpu", "torch": "2.0"}.__getitem__)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert qlora_kernels.__version__ == "1.2.3+cpu"
    assert "qlora_kernels 1.2.3+cpu, torch 2.0, Python 3." in capsys.readouterr().out


def test_completion_script(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    assert "--eval-every" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "nosh"])
    assert ended.value.code == 2
    assert "--print-completion: must be one of bash, zsh" in capsys.readouterr().err


def test_completion_without_shtab_names_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "qlora-kernels: shtab must be installed; run `pip install 'qlora_kernels[completion]'`\n"
    )


@pytest.mark.parametrize("command", ["generate", "merge", "eval", "chat"])
def test_missing_adapter_is_refused_before_model_is_read(capsys, monkeypatch, tmp_path, command):
    def never(*_):
        raise AssertionError("the model was read")

    monkeypatch.setattr(model_source, "dense_folder", never)
    rows = tmp_path / "rows.txt"
    rows.write_text("text")
    more = {"generate": ["--prompt", "x"], "merge": ["--out", str(tmp_path / "out")], "eval": ["--data", str(rows)]}
    adapter = str(tmp_path / "absent")
    assert main([command, "--model", "m", "--adapter", adapter, *more.get(command, [])]) == 2
    assert adapter in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes the streams")
def test_closed_standard_streams_are_connected_to_the_null_device(tmp_path):
    """Otherwise the file gets the number of stderr, and messages of native libraries are written into it."""
    script = f"""
import os, sys
from qlora_kernels.cli.standard_streams import open_standard_streams
open_standard_streams()
with open({str(tmp_path / "file")!r}, "w") as file:
    assert file.fileno() > 2
    print("out")
    os.write(1, b"out")
    os.write(2, b"err")
    sys.stdout.flush()
    file.write(f"{{sys.stdin.read()!r}} {{sys.stdout.isatty()}}")
"""
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    assert (tmp_path / "file").read_text() == "'' False"


def test_output_in_an_encoding_that_lacks_characters():
    script = "from qlora_kernels.cli.standard_streams import open_standard_streams as o; o(); print('a\\xe9\\u65e5')"
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, check=True)
    assert done.stdout.split() == [rb"a\xe9\u65e5"]
