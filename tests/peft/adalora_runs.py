"""A small configuration of AdaLoRA, and models trained with it."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.peft import AdaLoraConfig, PeftModel, get_peft_model
from tests.peft.models import batch, logits, make, randomize

FORMATS = pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])


def config(**options) -> AdaLoraConfig:
    return AdaLoraConfig(
        **{"target_modules": "all-linear", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 9}
        | options
    )


def adalora(model: PeftModel, name: str = "default"):
    return model.adapters[name][0]


def train(model: PeftModel, steps, kind: str = "llama", lr: float = 0.5, forget: bool = False) -> None:
    """SGD on random data that depend only on the step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for t in steps:
        loss = logits(model, batch(kind, seed=t)).square().mean() + model.peft_loss()
        loss.backward()
        optimizer.step()
        if not forget:
            model.step(t)
        optimizer.zero_grad()
    model.eval()


def trained(kind: str = "llama", *, nf4: bool = False, **options) -> PeftModel:
    """Return a model at the end of its schedule, different from the identity from the first step on."""
    model = get_peft_model(make(kind, nf4=nf4), config(**options))
    randomize(model, std=0.05)
    train(model, range(10), kind)
    return model
