"""Models with two adapters, and what rows with different adapters must compute."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.peft.models import logits, make, randomize
from tests.support.tolerances import assert_same_function

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


def assert_rows_use_their_adapters(model: PeftModel, inputs: dict[str, torch.Tensor], names: list[str]) -> None:
    """Each row of a batch with `adapter_names` has the logits of the row alone with its adapter."""
    mixed = logits(model, inputs, adapter_names=names)
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, row)
        else:
            model.set_adapter(name)
            alone = logits(model, row)
        assert_same_function(mixed[i : i + 1], alone)
