"""Linear layers whose weight other code reads: quantized ones work there, and those never called are found."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlora_kernels as qk
from qlora_kernels.nn.functional_use import read_but_never_called, weights_computed_with
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


def test_finds_weights_computed_with_and_never_called():
    assert read_but_never_called(nn.ModuleDict({"block": Block()})) == {"block.read": "Block"}
    block = Block()
    computed = weights_computed_with(block, block.children())
    assert [name for name, child in block.named_children() if child in computed] == ["read", "both"]


class Head(nn.Module):
    def forward(self, x, table):
        return x @ table.weight.T


class Model(nn.Module):
    """A model whose weights are read by a chain of attributes, by a module that gets the layer, and from a list."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.chained, self.inner.given = nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.inner.called = nn.Linear(4, 4)
        self.listed = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = Head()

    def get_input_embeddings(self):
        return self.inner.called

    def forward(self, x):
        x = self.inner.called(x @ self.inner.chained.weight.T @ self.inner.chained.weight)
        for layer in self.listed:
            x = F.linear(x, layer.weight)
        return self.head(x, self.inner.given)


def test_weights_read_by_other_modules():
    model = Model()
    leaves = [(name, m) for name, m in model.named_modules() if hasattr(m, "weight")]
    computed = weights_computed_with(model, [module for _, module in leaves])
    read = [name for name, module in leaves if module in computed]
    assert read == ["inner.chained", "inner.given", "listed.0", "listed.1"]


def test_multihead_attention_reads_out_proj_weight():
    assert read_but_never_called(nn.MultiheadAttention(8, 2)) == {"out_proj": "MultiheadAttention"}


def test_quantized_layer_works_where_weight_is_read():
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


def test_mamba_projection_read_but_never_called():
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
