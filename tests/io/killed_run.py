"""A tiny training run as a program that tests kill: python -m tests.io.killed_run DIR TOTAL_STEPS [MOMENT STEP]

It prints `<step> <loss in hex>` after each step, saves every fourth step, and continues from the newest checkpoint in
DIR. With MOMENT "inside-save" it sends itself SIGKILL during the save of STEP, when the file is written but has no name
yet. With "between-steps" it waits after STEP until it is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qlora_kernels import PagedAdamW
from qlora_kernels.io.training_state import load_latest, save_training_state

SAVE_EVERY = 4
BATCHES_PER_EPOCH = 5


def train(directory: str, total_steps: int) -> Iterator[tuple[int, float]]:
    """Train with dropout from torch's generator, data order from numpy's, and pages in an unnamed file.

    All of these must be restored after a kill, including the 8-bit states, whose file is lost with the process.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.2), nn.ReLU(), nn.Linear(128, 1))
    data = torch.randn(BATCHES_PER_EPOCH, 16, 64)
    Path(directory).mkdir(exist_ok=True)
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, state_bits=8, max_grad_norm=1.0, page_dir=directory)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=total_steps)
    order = np.random.permutation(BATCHES_PER_EPOCH).tolist()
    done = 0
    state = load_latest(directory)
    if state is not None:
        state.restore({"model": model, "optimizer": optimizer, "scheduler": scheduler})
        done, order = state.step, state.parts["data"]["order"]
    while done < total_steps:
        batch = data[order[done % BATCHES_PER_EPOCH]]
        loss = (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        done += 1
        if done % BATCHES_PER_EPOCH == 0:
            order = np.random.permutation(BATCHES_PER_EPOCH).tolist()
        yield done, loss.item()
        if done % SAVE_EVERY == 0:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": {"order": order}}
            save_training_state(directory, done, parts)


def main() -> None:
    directory, total_steps = sys.argv[1], int(sys.argv[2])
    moment, stop = (sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 3 else ("", 0)
    replace = os.replace

    def replace_or_die(source: str, target: str) -> None:
        if moment == "inside-save" and f"step-{stop:08d}" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die
    for step, loss in train(directory, total_steps):
        sys.stdout.write(f"{step} {loss.hex()}\n")
        sys.stdout.flush()
        while moment == "between-steps" and step == stop:
            time.sleep(600)


if __name__ == "__main__":
    main()
