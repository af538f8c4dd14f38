"""`qlora-kernels finetune` in several processes on the CPU: equal results, one report, and recovery from lost ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.finetune_runs import RUNS, STEPS

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.distributed.finetune_runs", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def outcome(folder, name):
    """Return [(exit code, stdout, stderr)] of each process of a run."""
    world = next(run.world for run in RUNS if run.name == name)
    return [
        (
            int((folder / f"{name}.{rank}.code").read_text()),
            (folder / f"{name}.{rank}.out").read_text(),
            (folder / f"{name}.{rank}.err").read_text(),
        )
        for rank in range(world)
    ]


def numbers(report):
    return {step["step"]: (step["loss"], step["grad_norm"], step["tokens"]) for step in report["steps"]}


def test_two_processes_give_results_of_one(folder):
    (code, text, errors), *_ = outcome(folder, "one")
    assert (code, errors) == (0, ""), errors
    first, second = outcome(folder, "two")
    assert (first[0], first[2]) == (0, ""), first[2]
    assert second == (0, "", "")
    one, two = json.loads(text), json.loads(first[1])
    assert numbers(one).keys() == numbers(two).keys() == set(range(1, STEPS + 1))
    for step, wanted in numbers(one).items():
        assert numbers(two)[step] == pytest.approx(wanted, rel=1e-3), step
    assert two["perplexity"]["NF4 base"] == one["perplexity"]["NF4 base"]  # the same batches, summed in the same order
    assert two["perplexity"]["NF4 + adapter, reloaded"] == two["perplexity"]["NF4 + adapter, trained"]
    assert two["predictions"] == one["predictions"]


@pytest.mark.parametrize(("name", "lost"), [("four that lose one", 3), ("two that lose one", 0)])
def test_lost_process_ends_others_with_error(folder, name, lost):
    for rank, (code, text, errors) in enumerate(outcome(folder, name)):
        assert text == ""
        if rank == lost:
            assert code == 9
        else:
            assert code == 1, errors
            assert f"rank {lost} of" in errors
            assert "must answer, got none; the run stops" in errors


def test_a_run_is_resumed_with_fewer_processes(folder):
    ((code, text, errors),) = outcome(folder, "the last")
    assert (code, errors) == (0, ""), errors
    resumed, one = json.loads(text), json.loads(outcome(folder, "one")[0][1])
    for step, wanted in numbers(one).items():
        assert numbers(resumed)[step] == pytest.approx(wanted, rel=1e-3), step
