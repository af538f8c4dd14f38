"""Adapters on layers whose weight the model reads instead of calling the layer, on some or all of its paths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import AdaLoraConfig, LoraConfig, get_peft_model
from tests.peft.models import randomize


class ReadsOrCalls(nn.Module):
    """A module like Mamba, whose fused kernel takes the weights of layers that its plain implementation calls."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 6)
        self.fused = False

    def forward(self, x):
        return nn.functional.linear(x, self.proj.weight, self.proj.bias) if self.fused else self.proj(x)


OPTIONS = {
    "lora": LoraConfig(r=2, target_modules=["proj"]),
    "lora with a bias": LoraConfig(r=2, target_modules=["proj"], lora_bias=True),
    "trained bias": LoraConfig(r=2, target_modules=["proj"], bias="all"),
    "dora": LoraConfig(r=2, target_modules=["proj"], use_dora=True),
    "pissa": LoraConfig(r=2, target_modules=["proj"], init_lora_weights="pissa"),
    "adalora": AdaLoraConfig(init_r=2, target_r=2, target_modules=["proj"], total_step=10, tfinal=1),
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_read_weight_includes_adapters(config, quantized):
    torch.manual_seed(0)
    base = ReadsOrCalls().double()
    if quantized:
        qk.replace_linear(base.float())
    model = get_peft_model(base, config).eval()
    randomize(model)
    dtype = torch.float32 if quantized else torch.float64
    x = torch.randn(3, 8, dtype=dtype)
    results = []
    for base.fused in (False, True):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    for called, read in zip(*results, strict=True):
        torch.testing.assert_close(read, called, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(base.proj.weight, base.proj.base_layer.weight)
    model.merge_adapter()
    torch.testing.assert_close(model(x), results[1][0], rtol=1e-4, atol=1e-5)


def test_limits_of_read_weights_are_reported():
    base = ReadsOrCalls()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["proj"], lora_dropout=0.5))
    model(torch.zeros(2, 8))
    base.fused = True
    with pytest.warns(UserWarning, match=r"lora_dropout: 0\.5 of adapter 'default' does not act where a model reads"):
        model(torch.zeros(2, 8))
    model.eval()
    with pytest.raises(NotImplementedError, match="adapter_names: must not be given for a model that reads the weight"):
        model(torch.zeros(2, 8), adapter_names=["default", "__base__"])


def test_head_that_receives_the_embedding_as_argument():
    """DeBERTa-v2's head multiplies by the embedding's table, which the model passes to it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.legacy = False
    torch.manual_seed(0)
    base = transformers.DebertaV2ForMaskedLM(config)
    ids = torch.arange(12).view(2, 6)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["word_embeddings"])).eval()
    before = model(ids).logits
    randomize(model)
    with torch.no_grad():
        adapted = model(ids).logits
        assert not torch.allclose(adapted, before)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, adapted, rtol=1e-4, atol=1e-5)


class LooksAtAWeight(nn.Module):
    """As for T5's wo, whose dtype decides on a cast."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(8, 6)

    def forward(self, x):
        if self.wo.weight is not None and isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


def test_metadata_access_is_not_a_read():
    model = get_peft_model(LooksAtAWeight(), LoraConfig(r=2, target_modules=["wo"], lora_dropout=0.5)).train()
    assert not model.injector.adapted_layers()["wo"].weight_is_read
    model(torch.zeros(2, 8)).sum().backward()
