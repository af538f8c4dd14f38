"""Exact resumption: saved values return bit for bit, and a kill loses only the steps since the last checkpoint."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_kernels.io import training_state
from qlora_kernels.io.safetensors_reader import DamagedFileError
from qlora_kernels.io.safetensors_writer import DTYPE_NAMES
from qlora_kernels.io.training_state import load_latest, load_training_state, save_training_state

from . import killed_run

ROOT = Path(__file__).parents[2]
TOTAL_STEPS = 60


@pytest.mark.parametrize(
    "value",
    [
        {"step": 3, "lr": 0.1, "name": "cosine", "none": None, "flag": True, "inf": float("inf")},
        {0: {"betas": (0.9, 0.999)}, "nested": [[1], (2, [3])]},
        Counter({30: 1, 80: 2}),
        [],
    ],
    ids=["scalars", "integer-keys-and-tuples", "counter", "empty"],
)
def test_plain_data_round_trips_with_types(tmp_path, value):
    save_training_state(tmp_path, 1, {"part": value})
    loaded = load_latest(tmp_path).parts["part"]
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)], ids=str)
def test_tensors_round_trip_bit_for_bit(tmp_path, dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    path = save_training_state(tmp_path, 1, {"part": {"t": tensor}})
    loaded = load_latest(tmp_path).parts["part"]["t"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)
    assert torch.equal(load_file(path)["parts.part.t"], tensor)  # other programs read the file too


def test_transposed_tensor_and_colliding_names(tmp_path):
    value = {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}, "t": torch.arange(6.0).view(2, 3).T}
    save_training_state(tmp_path, 1, {"part": value})
    loaded = load_latest(tmp_path).parts["part"]
    assert torch.equal(loaded["a.b"], value["a.b"])
    assert torch.equal(loaded["a"]["b"], value["a"]["b"])
    assert torch.equal(loaded["t"], value["t"])


def test_random_generators_are_restored(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    random.gauss(0, 1)
    save_training_state(tmp_path, 1, {})
    drawn = torch.rand(3), np.random.rand(3), random.gauss(0, 1)
    load_latest(tmp_path).restore({})
    again = torch.rand(3), np.random.rand(3), random.gauss(0, 1)
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2] == again[2]


def test_newest_checkpoints_kept_and_newest_loaded(tmp_path):
    assert load_latest(tmp_path / "absent") is None
    for step in (9, 10, 11):
        save_training_state(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-00000010.safetensors",
        "step-00000011.safetensors",
    ]
    assert load_latest(tmp_path).step == 11


def test_failed_write_keeps_previous_checkpoint(tmp_path, monkeypatch):
    save_training_state(tmp_path, 1, {"x": 1})

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_kernels.io.atomic.os.fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_training_state(tmp_path, 2, {"x": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert load_latest(tmp_path).parts == {"x": 1}


def damaged(content: bytes) -> list[bytes]:
    """Return variants cut short at many lengths, and with one bit changed at many places."""
    cuts = [content[:length] for length in {0, 1, 7, 8, 9, *range(16, len(content), 101), len(content) - 1}]
    flips = [
        content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :]
        for i in {*range(10), *range(10, len(content), 37)}
    ]
    return cuts + flips


def test_damaged_checkpoint_falls_back_to_previous(tmp_path):
    save_training_state(tmp_path, 1, {"x": torch.arange(50.0)})
    path = save_training_state(tmp_path, 2, {"x": torch.arange(50.0) + 1})
    harmless = 0
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = load_latest(tmp_path)
        if found.step == 1:
            assert re.search("step-00000002.*loading the previous checkpoint", str(caught[0].message))
        else:  # the changed bit was in the name of an unused metadata entry
            harmless += 1
            assert torch.equal(found.parts["x"], torch.arange(50.0) + 1)
    assert harmless < 2
    path.write_bytes(b"")
    (tmp_path / "step-00000001.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-0000000"), pytest.raises(DamagedFileError, match="step-00000002"):
        load_latest(tmp_path)


def test_refusals_name_the_place(tmp_path):
    with pytest.raises(TypeError, match=r"parts\.scheduler\.fn must be plain data or tensors, got function"):
        save_training_state(tmp_path, 1, {"scheduler": {"fn": lambda: None}})
    with pytest.raises(TypeError, match=r"parts\.z must be of a dtype that safetensors has, got torch\.complex64"):
        save_training_state(tmp_path, 1, {"z": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="step must be >= 0"):
        save_training_state(tmp_path, -1, {})
    with pytest.raises(ValueError, match="keep must be >= 1"):
        save_training_state(tmp_path, 1, {}, keep=0)
    path = save_training_state(tmp_path, 1, {"a": 1})
    with pytest.raises(KeyError, match=r"no part 'b' was saved; the file holds \['a'\]"):
        load_latest(tmp_path).restore({"b": torch.nn.Linear(1, 1)})
    header = json.dumps({"__metadata__": {}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="must be a file of save_training_state"):
        load_training_state(path)


def _program(directory: Path, *arguments: str | int) -> list[str]:
    return [sys.executable, "-m", "tests.io.killed_run", str(directory), str(TOTAL_STEPS), *map(str, arguments)]


def _losses(text: str) -> dict[int, str]:
    return {int(step): loss for step, loss in (line.split() for line in text.splitlines())}


@pytest.mark.parametrize("moment", ["between-steps", "inside-save"])
def test_killed_run_resumes_with_bit_identical_losses(tmp_path, moment):
    expected = {step: loss.hex() for step, loss in killed_run.train(str(tmp_path / "whole"), TOTAL_STEPS)}
    directory = tmp_path / "killed"
    if moment == "inside-save":
        died = subprocess.run(_program(directory, moment, 12), cwd=ROOT, capture_output=True, text=True, check=False)
        assert died.returncode == -signal.SIGKILL
        before = _losses(died.stdout)
        assert load_latest(directory).step == 8
        assert list(directory.glob(".partial-*.step-*"))
    else:
        program = _program(directory, moment, 10)
        with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            lines = [process.stdout.readline() for _ in range(10)]
            process.kill()
        assert process.returncode == -signal.SIGKILL
        before = _losses("".join(lines))
        assert load_latest(directory).step == 8
    resumed = subprocess.run(_program(directory), cwd=ROOT, capture_output=True, text=True, check=True)
    after = _losses(resumed.stdout)
    assert min(after) > killed_run.SAVE_EVERY  # the run resumed
    assert max(after) == TOTAL_STEPS
    assert {**before, **after} == expected
    assert not list(directory.glob(".partial-*.step-*"))


def test_load_latest_during_concurrent_saves(tmp_path, monkeypatch):
    """The folder must not be considered empty, which would restart the run."""
    save_training_state(tmp_path, 1, {"x": 1})
    load = training_state.load_training_state

    def load_late(path):
        if path.name == "step-00000001.safetensors":
            save_training_state(tmp_path, 2, {"x": 2}, keep=1)
        return load(path)

    monkeypatch.setattr(training_state, "load_training_state", load_late)
    state = load_latest(tmp_path)
    assert state is not None
    assert state.parts == {"x": 2}
