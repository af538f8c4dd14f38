"""finetune --track with TensorBoard, Weights & Biases (offline) and trackio themselves: the values that they record."""

from __future__ import annotations

import json
import struct
import sys

import numpy as np
import pytest

from qlora_kernels.cli import main
from qlora_kernels.cli.arguments import UsageError
from qlora_kernels.cli.trackers import check_trackers
from tests.cli.finetune_runs import arguments
from tests.support.tiny_model import write_tiny_llama

BLOCK, HEADER = 32768, 7


def of_tensorboard(out):
    """Return {metric: [(step, value)]} and no settings, as TensorBoard has none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}, None


def of_wandb(out):
    """Return {metric: [(step, value)]} and the settings from the file that `wandb sync` uploads."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (out / "wandb").glob("offline-run-*/*.wandb")
    metrics, settings = {}, {}
    for content in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name in items.keys() - {"_step", "_timestamp", "_runtime"}:
                metrics.setdefault(name, []).append((items["_step"], items[name]))
        elif record.WhichOneof("record_type") == "run":
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert (record.run.project, record.run.display_name) == ("a-project", "a-run")
    return metrics, settings


def records(data):
    """Yield the records of a log in LevelDB's format, of which wandb's files are a variant with a header."""
    position, content = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        content += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield content
            content = b""


def of_trackio(out):
    """Return {metric: [(step, value)]} and the settings from trackio's database."""
    from trackio.sqlite_storage import SQLiteStorage

    metrics = {}
    for row in SQLiteStorage.get_logs("a-project", "a-run"):
        for name in row.keys() - {"step", "timestamp"}:
            metrics.setdefault(name, []).append((row["step"], row[name]))
    return metrics, SQLiteStorage.get_run_config("a-project", "a-run")


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio}


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return write_tiny_llama(folder / "model"), folder / "text.txt"


@pytest.mark.parametrize("tracker", READERS)
def test_recorded_values_are_those_of_the_report(capsys, monkeypatch, tmp_path, tracker, model_and_text):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is first imported
    pytest.importorskip(tracker)
    options = ["--track", tracker, "--project", "a-project", "--run-name", "a-run", "--eval-every", "3", "--json"]
    assert main(arguments(*model_and_text, tmp_path / "out", *options)) == 0
    report = json.loads(capsys.readouterr().out)
    metrics, settings = READERS[tracker](tmp_path / "out")
    expected = {
        f"train/{name}": [(s["step"], s[name]) for s in report["steps"]] for name in ("loss", "lr", "grad_norm")
    }
    expected["eval/perplexity"] = [(one["step"], one["perplexity"]) for one in report["evaluations"]]
    for name, points in expected.items():
        assert [step for step, _ in metrics[name]] == [step for step, _ in points], name
        np.testing.assert_allclose([v for _, v in metrics[name]], [v for _, v in points], rtol=1e-6)  # fp32 in events
    assert [step for step, _ in metrics["train/tokens_per_second"]] == [step["step"] for step in report["steps"]]
    if settings is not None:
        assert {name: settings[name] for name in ("r", "lr", "seed")} == {"r": 4, "lr": 1e-2, "seed": 0}


def test_a_folder_of_runs_is_not_the_library(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UsageError, match="wandb must be installed"):
        check_trackers(["wandb"])
