"""DeepSpeed's ZeRO-3 shards NF4 weights after make_shardable, and trains as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed, which is built from source")


def test_zero3_shards_nf4_weights(tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.distributed.zero3_steps", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert file.is_file(), done.stderr[-3000:]
    results = json.loads(file.read_text())
    assert results["losses"] == pytest.approx(results["one_process"], rel=1e-5)
    # Half of the bytes, and the padding of each tensor to equal parts.
    assert results["held"] <= 0.52 * results["whole"]
