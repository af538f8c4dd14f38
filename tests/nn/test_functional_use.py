"""Linear layers whose weight is read by other code: a quantized one serves it, and what is never called is found."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlora_kernels as qk
from qlora_kernels.nn.functional_use import computes_with_weight, read_but_never_called
from tests.support.tolerances import assert_same_function


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called, self.both, self.looked_at = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.inner = nn.Sequential(nn.Linear(32, 32))
        nn.init.zeros_(self.called.weight)

    def forward(self, x):
        x = F.linear(x, self.read.weight) + self.called(x)
        x = x @ self.both.weight.T + self.both(x)
        if isinstance(self.looked_at.weight, torch.Tensor):
            x = x.to(self.looked_at.weight.dtype)
        return self.inner(self.looked_at(x))


def test_names_only_what_is_computed_with_and_never_called():
    assert read_but_never_called(nn.ModuleDict({"block": Block()})) == {"block.read": "Block"}
    assert [name for name, _ in Block().named_children() if computes_with_weight(Block(), name)] == ["read", "both"]


def test_torchs_attention_reads_its_projection():
    assert read_but_never_called(nn.MultiheadAttention(8, 2)) == {"out_proj": "MultiheadAttention"}


def test_a_quantized_layer_serves_the_code_that_reads_it():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(3, 32, requires_grad=True)
    qk.replace_linear(block)
    y = block(x)
    dense = Block()
    with torch.no_grad():
        for name in ("read", "called", "both", "looked_at"):
            getattr(dense, name).weight.copy_(getattr(block, name).weight)
        dense.inner[0].weight.copy_(block.inner[0].weight)
        dense.inner[0].bias.copy_(block.inner[0].bias)
    again = x.detach().clone().requires_grad_()
    expected = dense(again)
    assert_same_function(y, expected, products=4)
    y.sum().backward()
    expected.sum().backward()
    assert_same_function(x.grad, again.grad, products=4)


def test_mamba_multiplies_by_one_of_its_projections():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    mixer = "backbone.layers.0.mixer"
    assert set(read_but_never_called(model)) == {f"{mixer}.conv1d", f"{mixer}.dt_proj"}
    dense = copy.deepcopy(model)
    qk.replace_linear(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, qk.LinearNF4):
                dense.get_submodule(name).weight.copy_(module.weight)
    ids = torch.randint(32, (2, 5))
    assert_same_function(model(ids).logits, dense(ids).logits)
