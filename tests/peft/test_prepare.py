"""prepare_for_training: the casts of the base model, and training and generation after them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, get_peft_model
from tests.peft.models import HEADS, batch, logits, make


def test_prepare_for_training():
    model = make("llama").bfloat16()
    qk.peft.prepare_for_training(model, upcast="norms", gradient_checkpointing=False)
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert {d for n, d in dtypes.items() if "norm" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "norm" not in n} == {torch.bfloat16}
    qk.peft.prepare_for_training(model, upcast="all", gradient_checkpointing=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(NotImplementedError, match="gradient_checkpointing_enable"):
        qk.peft.prepare_for_training(make("torch"))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert", "gpt2", "t5"])
@pytest.mark.parametrize("autocast", [False, True])
def test_prepared_models_train_and_generate_in_bf16(kind, autocast):
    """With the defaults, in a plain loop: fp32 norms must not make the rest of the model compute in fp32."""
    base = make(kind).bfloat16()
    qk.replace_linear(base, skip=(HEADS[kind],))
    model = get_peft_model(qk.prepare_for_training(base), LoraConfig(r=2, target_modules="all-linear")).train()
    inputs = batch(kind, rows=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = logits(model, inputs)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    if kind != "bert":
        inputs.pop("decoder_input_ids", None)
        assert model.eval().generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 2


def test_prepared_norm_casts_its_input():
    """As in Mamba, whose residuals are fp32."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.proj = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.proj(self.norm(x.to(self.norm.weight.dtype)))

    model = qk.prepare_for_training(Block().bfloat16(), gradient_checkpointing=False)
    assert model(torch.randn(2, 8)).dtype == torch.float32
    assert model(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
