"""`qlora-kernels finetune` in several processes on the CPU: equal results, one report, and recovery from lost ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kernels.distributed.byte_plan import Rows, dense_rows, held_bytes, lora_rows, nf4_rows
from tests.distributed.finetune_runs import RUNS, STEPS
from tests.support.tiny_model import LAYERS

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.distributed.finetune_runs", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def outcome(folder, name):
    """Return [(exit code, stdout, stderr)] of each process of a run."""
    world = next(run.world for run in RUNS if run.name == name)
    return [
        (
            int((folder / f"{name}.{rank}.code").read_text()),
            (folder / f"{name}.{rank}.out").read_text(),
            _without_bitsandbytes((folder / f"{name}.{rank}.err").read_text()),
        )
        for rank in range(world)
    ]


def _without_bitsandbytes(text):
    """Return the text without the line that bitsandbytes writes when accelerate imports it."""
    return "".join(line for line in text.splitlines(keepends=True) if "kernels-community" not in line)


def numbers(report):
    return {step["step"]: (step["loss"], step["grad_norm"], step["tokens"]) for step in report["steps"]}


def report_of(folder, name):
    """Return the report of a run that succeeded, of which the processes other than the first print nothing."""
    (code, text, errors), *others = outcome(folder, name)
    assert (code, errors) == (0, ""), errors
    assert all(other == (0, "", "") for other in others), others
    return json.loads(text)


def assert_same_steps(report, one):
    assert numbers(report).keys() == numbers(one).keys() == set(range(1, STEPS + 1))
    for step, wanted in numbers(one).items():
        assert numbers(report)[step] == pytest.approx(wanted, rel=1e-3), step


@pytest.mark.parametrize("name", ["two", "two sharded", "three sharded by accelerate"])
def test_several_processes_give_results_of_one(folder, name):
    one, several = report_of(folder, "one"), report_of(folder, name)
    assert_same_steps(several, one)
    assert several["perplexity"].keys() == one["perplexity"].keys()
    assert several["perplexity"]["NF4 + adapter, reloaded"] == several["perplexity"]["NF4 + adapter, trained"]
    assert several["predictions"] == one["predictions"]
    assert several["sample"] == one["sample"]
    if name != "two sharded":  # the same batches, summed in the same order
        assert several["perplexity"]["NF4 base"] == one["perplexity"]["NF4 base"]


@pytest.mark.parametrize("name", ["two by Trainer", "two sharded by Trainer"])
def test_trainer_in_several_processes_gives_results_of_one(folder, name):
    assert_same_steps(report_of(folder, name), report_of(folder, "one"))


@pytest.mark.parametrize(("name", "world"), [("two sharded", 2), ("three sharded by accelerate", 3)])
def test_processes_hold_the_predicted_bytes(folder, name, world):
    """Each holds its rows of the NF4 tensors, of the embedding, which is also the head, and of the factors."""
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    block = [rows for N, K in linears for rows in nf4_rows(N, K)] + 2 * [Rows(64, 4)]
    base = LAYERS * block + [*dense_rows(257, 64, itemsize=4), Rows(64, 4)]
    factors = LAYERS * [rows for N, K in linears for rows in lora_rows(N, K, 4)]
    expected = [[held_bytes(base, world, rank), held_bytes(factors, world, rank)] for rank in range(world)]
    assert report_of(folder, name)["held_bytes"] == expected


@pytest.mark.parametrize("name", [run.name for run in RUNS if run.dies or run.hangs])
def test_lost_process_ends_others_with_error(folder, name):
    run = next(run for run in RUNS if run.name == name)
    lost = (run.dies or run.hangs)[0]
    for rank, (code, text, errors) in enumerate(outcome(folder, name)):
        assert text == ""
        if rank == lost:
            assert code == (9 if run.dies else -9)
        else:
            assert code == 1, errors
            assert f"qlora-kernels finetune: rank {lost} of {run.world} must answer, got none; the run stops" in errors


def test_signal_to_one_process_stops_all_after_the_same_step(folder):
    first, *others = outcome(folder, "four sharded with a signal")
    assert first[0] == 143, first[2]
    assert "stopped by a signal after step 2 of 6; continue with" in first[2]
    assert [code for code, _, _ in others] == [143, 143, 143]
    assert "SIGTERM: training stops after this step" in others[0][2]
    assert others[1:] == [(143, "", "")] * 2


@pytest.mark.parametrize("name", ["the last", "the last of the sharded"])
def test_a_run_is_resumed_with_fewer_processes(folder, name):
    assert_same_steps(report_of(folder, name), report_of(folder, "one"))
