"""Models with two adapters, for the tests of several adapters on one model."""

from __future__ import annotations

import pytest

from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.peft.models import make, randomize

FORMATS = pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])


def two_adapters(nf4: bool = False, kind: str = "llama") -> PeftModel:
    """Return a model with adapters "default" and "b", of different rank, scaling and targets, not identities."""
    model = get_peft_model(make(kind, nf4=nf4), LoraConfig(target_modules="all-linear", r=4))
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}[kind]
    model.add_adapter("b", LoraConfig(target_modules=targets, r=2, lora_alpha=8))
    for i, name in enumerate(("b", "default")):
        model.set_adapter(name)
        randomize(model, seed=i)
    return model.eval()
