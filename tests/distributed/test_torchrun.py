"""A real torchrun that gets a signal: its processes stop after the same step, with a checkpoint of that step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_kernels.io.training_state import load_latest
from tests.support.tiny_model import write_tiny_llama

pytest.importorskip("transformers")
STEPS = 5000


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun ends its processes without signals on Windows")
def test_interrupted_torchrun_writes_checkpoint_of_last_step(tmp_path):
    write_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    out = tmp_path / "out"
    options = f"--steps {STEPS} --batch 2 --seq-len 16 --eval-windows 0 --r 2 --max-new-tokens 0 --fsdp"
    files = ["--model", tmp_path / "model", "--data", tmp_path / "text.txt", "--out", out]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--shutdown-timeout=280"]  # after it, torchrun kills; by default after 30 s
    command += ["-m", "--", "qlora_kernels.cli", "finetune", *map(str, files), *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    root = Path(__file__).parents[2]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--checkpoint-every=1"], cwd=root, env=environment, stdout=log, stderr=log, text=True
        )
        try:
            while not (out / "checkpoints").is_dir() and process.poll() is None:
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=300)
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    stopped = re.findall(rf"stopped by SIGINT after step (\d+) of {STEPS}; continue with: ", text)
    state = load_latest(out / "checkpoints")
    assert len(stopped) == 1, text
    assert state is not None
    assert state.step == int(stopped[0])
