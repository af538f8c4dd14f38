"""DistributedDataParallel over every method: two processes with half a batch each have the gradients of the whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.peft.cases import CASES, build
from tests.peft.models import batch, logits, randomize
from tests.support.tolerances import assert_same_gradients

dist.init_process_group("gloo")
rank = dist.get_rank()
for case in CASES:
    for kind in ("llama", "bert"):
        whole, half = build(case, kind), build(case, kind)
        for model in (whole, half):
            randomize(model)
            model.train()
        inputs = batch(kind, rows=4)
        logits(whole, inputs).square().mean().backward()
        wrapped = DistributedDataParallel(half)
        logits(wrapped, {k: v[2 * rank : 2 * rank + 2] for k, v in inputs.items()}).square().mean().backward()
        expected = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
        assert_same_gradients({n: p.grad for n, p in half.named_parameters() if p.requires_grad}, expected)
dist.destroy_process_group()
"""


def test_ddp():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER],
            env={**os.environ, **here, "RANK": str(rank)},
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors
