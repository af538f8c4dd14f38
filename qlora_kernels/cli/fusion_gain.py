"""Measures the time of a training step with and without fuse_model, for a given model in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from .. import fuse_model, unfuse_model
from ..training import ChunkedLoss, Example, collate

ROUNDS = 2
"""Number of timed steps of each form. The forms alternate, so that other load on the machine affects both."""


def step_seconds(model: nn.Module, examples: Sequence[Example], pad_token_id: int) -> dict[str, float]:
    """Return the minimum time of a step (forward and backward of one batch) by form, "plain" and "fused".

    Afterwards the model has its former form, parameters, gradients and mode, and the random generators their former
    states. Returns an empty dict if fuse_model replaces nothing.
    """
    was_fused, training = bool(unfuse_model(model)), model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    device = trained[0].device
    seconds: dict[str, list[float]] = {"plain": [], "fused": []}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.train()
            for turn in range(ROUNDS + 1):
                # The first step is not timed; it fills the caches of the allocator and of compiled kernels.
                batch = collate(examples if turn else examples[:1], pad_token_id).to(device)
                for form, times in seconds.items():
                    report = fuse_model(model) if form == "fused" else None
                    if report is not None and not report.replaced:
                        return {}
                    loss = ChunkedLoss(model)
                    started = time.perf_counter()
                    loss(batch).backward()
                    _wait_for(device)
                    if turn:
                        times.append(time.perf_counter() - started)
                    if report is not None:
                        report.undo()
    finally:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        model.train(training)
        unfuse_model(model)
        if was_fused:
            fuse_model(model)
    return {form: min(times) for form, times in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
