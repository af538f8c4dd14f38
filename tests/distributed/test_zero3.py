"""DeepSpeed's ZeRO-3 shards NF4 weights after make_shardable, trains as one process does, saves and restores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed, which is built from source")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("zero3") / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.distributed.zero3_steps", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert file.is_file(), done.stderr[-3000:]
    return json.loads(file.read_text())


def test_zero3_shards_nf4_weights(results):
    assert results["losses"] == pytest.approx(results["one_process"], rel=1e-5)
    # Half of the bytes, and the padding of each tensor to equal parts.
    assert results["held"] <= 0.52 * results["whole"]


def test_checkpoints_restore_weights_adapters_and_optimizer(results):
    """By load_checkpoint, zero_to_fp32, save_16bit_model, and the adapter's own files."""
    last = results["losses"][3:]
    assert len(results["restored"]) == 6
    for name, losses in results["restored"].items():
        assert losses == pytest.approx(last[: len(losses)], rel=1e-5), name
