"""The quick benchmark run: every implementation's result is right and every row complete. Times are not checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

EVERY = {"op", "case", "contender", "mode", "gate", "time", "device", "machine", "isa", "commit", "versions"}
TIMED = {"M", "N", "K", "r", "dropout", "dtype", "threads", "median_us", "p10_us", "p90_us", "samples", "foreign"}
OPS = {"peak", "quantize_nf4", "dequantize_nf4", "linear_nf4", "linear_nf4_grad_x", "linear_nf4_lora", "adamw_step"}
OPS |= {"linear_cross_entropy", "attention", "model_parts"}
TIMED |= {"gbps", "gflops", "fraction", "roofline", "speedup"}


@pytest.mark.slow
def test_quick_run():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.run", "cpu", "--quick", "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["gate"] == "green"
        assert row.keys() >= EVERY | (set() if row["op"] == "peak" else TIMED)
    held = {row["contender"]: row["state_bytes_per_element"] for row in rows if row["op"] == "adamw_step"}
    assert held["ours"] < 8.1
    assert held["ours 8-bit"] < 2.1
    assert {row["op"] for row in rows} == OPS | {"train_step", "evaluate", "generate", "methods"}
