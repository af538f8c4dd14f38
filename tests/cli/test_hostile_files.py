"""Damaged and hostile files end a command with one line; `make fuzz-files` tests many more of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.hostile_files import folders, fuzz, run

ROOT = Path(__file__).parents[2]


def test_random_changes():
    """Most changes are refused; some affect only unused values."""
    codes = [code for _, code, _ in fuzz(40, seed=5)]
    assert codes.count(2) > 10
    assert codes.count(1) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("folders"))


def changed_json(folder: Path, name: str, **values) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def generate(model, *more) -> tuple[int, str]:
    return run(["generate", "--model", str(model), "--prompt", "a", "--max-new-tokens", "1", *map(str, more)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 10**9}, "must be that of its tensors"),
        ({"rank_pattern": {"q_proj": 10**9}}, "must be that of its tensors"),
        ({"r": "8"}, "r must"),
        ({"lora_alpha": float("nan")}, "numbers must be finite, got NaN"),
        ({"target_modules": 5}, "target_modules"),
        ({"peft_type": ["LORA"]}, "peft_type must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_adapter_configurations(whole, tmp_path, values, message):
    shutil.copytree(whole["lora"], tmp_path / "adapter")
    code, line = generate(
        whole["nf4"], "--adapter", changed_json(tmp_path / "adapter", "adapter_config.json", **values)
    )
    assert code == 2
    assert message in line


def test_unusable_paths_are_refused(whole, tmp_path):
    (tmp_path / "file").touch()
    for argv, message in (
        (
            ["quantize", whole["dense"], tmp_path / "file" / "out"],
            "must be a folder; it, or a folder above it, is a file",
        ),
        (["quantize", whole["dense"], tmp_path / "file"], "DST must not exist"),
        (["quantize", tmp_path / "file", tmp_path / "out"], "must be a model folder"),
        (["generate", "--model", whole["dense"], "--cache", tmp_path / "file", "--prompt", "a"], "must be a folder"),
        (["generate", "--model", whole["nf4"], "--adapter", tmp_path / "file", "--prompt", "a"], "must exist"),
        (["merge", "--model", whole["nf4"], "--adapter", whole["lora"], "--out", tmp_path / "file"], "must not exist"),
    ):
        code, line = run([str(argument) for argument in argv])
        assert code == 2
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_or_closed_output(whole):
    command = [sys.executable, "-m", "qlora_kernels.cli", "info"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    closed = subprocess.run([*command], cwd=ROOT, stdout=_closed_pipe(), stderr=subprocess.PIPE, text=True, check=False)
    assert closed.returncode == 1
    assert closed.stderr == ""


def _closed_pipe() -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_removes_the_scratch_folders(whole, tmp_path, number):
    """quantize works in a folder beside its target, and in one in the system's folder for temporary files."""
    program = """
import signal, sys, time
from qlora_kernels.cli import model_source
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
def wait(*arguments, **options):
    print("waiting", flush=True)
    time.sleep(600)
model_source.quantize_with_bar = wait
from qlora_kernels.cli import main
sys.exit(main(["quantize", *sys.argv[1:]]))
"""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    argv = [sys.executable, "-c", program, str(whole["dense"]), str(tmp_path / "out")]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"waiting\n"
    assert list(scratch.iterdir())
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)  # a watchdog, half of what `wait` sleeps
    assert process.returncode == 128 + number
    assert b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert not list(scratch.iterdir())
