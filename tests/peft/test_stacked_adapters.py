"""Two active adapters on one layer: a merged layer, and a weight that code reads, compute what forward computes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_kernels import peft, replace_linear
from qlora_kernels.peft import PeftModel
from tests.peft.models import randomize
from tests.support.tolerances import assert_same_function

TARGET = {"target_modules": ["linear"]}
CONFIGS = {
    "lora": peft.LoraConfig(r=2, **TARGET),
    "lora_offset": peft.LoraConfig(r=2, lora_bias=True, **TARGET),
    "lora_bias": peft.LoraConfig(r=2, bias="lora_only", **TARGET),
    "dora": peft.LoraConfig(r=2, use_dora=True, **TARGET),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=4, **TARGET),
    "ia3": peft.IA3Config(feedforward_modules=[], **TARGET),
    "ia3_input": peft.IA3Config(feedforward_modules=["linear"], **TARGET),
    "vera": peft.VeraConfig(r=2, **TARGET),
    "loha": peft.LoHaConfig(r=3, rank_dropout=0.5, **TARGET),
    "lokr": peft.LoKrConfig(r=2, module_dropout=0.5, **TARGET),
    "oft": peft.OFTConfig(oft_block_size=4, module_dropout=0.5, **TARGET),
    "boft": peft.BOFTConfig(boft_n_butterfly_factor=2, boft_dropout=0.5, **TARGET),
    "bitfit": peft.BitFitConfig(),
    "tokens": peft.TrainableTokensConfig(token_indices=[1, 5], **TARGET),
}
"""One configuration of each kind of update that merges, with dropout where it is not applied to the input."""


class Layer(nn.Module):
    """A linear layer with a bias."""

    def __init__(self, n: int = 12, k: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x):
        return self.linear(x)


def stacked(*kinds, nf4=False):
    """Return a layer with one adapter of each kind, all active in this order, in evaluation mode."""
    torch.manual_seed(0)
    model = Layer()
    if nf4:
        replace_linear(model, skip=())
    model = PeftModel(model)
    names = [f"{number}" for number in range(len(kinds))]
    for number, kind in enumerate(kinds):
        model.add_adapter(names[number], CONFIGS[kind])
        model.set_adapter(names[number])
        randomize(model, std=0.3, seed=number)
    model.set_adapter(names)
    return model.eval()


REPLACE_THE_BIAS = {"lora_bias", "bitfit"}
PAIRS = [pair for pair in product(CONFIGS, CONFIGS) if not set(pair) <= REPLACE_THE_BIAS]


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_merge_equals_forward(first, second):
    model, x = stacked(first, second), torch.randn(5, 16)
    y = model(x)
    layer = model.injector.called_module("linear")
    if hasattr(layer, "base_layer"):
        layer.weight_is_read = True
        assert_same_function(F.linear(x, layer.weight, layer.bias), y, "weight and bias as they are read")
        layer.weight_is_read = False
    model.train()  # a merge takes the whole update, also where dropout would act on it
    model.merge_adapter(target="same")
    assert_same_function(model.eval()(x), y, "merged")


@pytest.mark.parametrize("kind", ["dora", "boft", "ia3"])
def test_gradients_reach_the_adapter_that_changed_the_bias(kind):
    """The second adapter scales the output without its bias, which the first one trains."""
    model, x = stacked("lora_offset", kind), torch.randn(5, 16)
    for parameter in model.adapters.parameters():
        parameter.requires_grad_(True)
    layer = model.injector.called_module("linear")
    model(x).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}
    model.zero_grad()
    layer.weight_is_read = True
    F.linear(x, layer.weight, layer.bias).square().mean().backward()
    for name, p in model.adapters.named_parameters():
        if p.grad is not None:
            assert_same_function(p.grad, grads[name], name)


def test_two_biases_in_one_place_are_refused():
    with pytest.raises(ValueError, match=r"must not replace the same parameters, got linear\.bias"):
        stacked("bitfit", "lora_bias")


@torch.no_grad()
@pytest.mark.parametrize("second", CONFIGS)
def test_merge_over_nf4_equals_forward(second):
    model, x = stacked("lora_offset", second, nf4=True), torch.randn(5, 16)
    y = model(x)
    model.merge_adapter()
    assert_same_function(model(x), y)


@torch.no_grad()
@pytest.mark.parametrize("below", ["lora", "oft", "ia3"])
def test_new_dora_is_the_identity_above_another_adapter(below):
    """Its norms are of the base weight, as in PEFT, so that it starts without effect whatever is active below it."""
    model, x = stacked(below), torch.randn(5, 16)
    y = model(x)
    model.add_adapter("dora", CONFIGS["dora"])
    model.set_adapter(["0", "dora"])
    assert_same_function(model(x), y)
