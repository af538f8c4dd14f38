"""fuse_shared_input: one op for layers with one input, with equal results, and a fallback for different inputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, get_peft_model
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function, assert_same_gradients


class Parent(nn.Module):
    """The q, k, v and out projections of an attention, without the attention."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 48), nn.Linear(32, 16, bias=False), nn.Linear(32, 16)

    def forward(self, x, other=None):
        other = x if other is None else other
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], dim=-1)


def small(dropout=0.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(Parent(), nn.Tanh(), nn.Linear(80, 32), Parent())
    qk.replace_linear(model, skip=())
    config = {"r": 4, "lora_dropout": dropout, "target_modules": ["q_proj", "k_proj", "v_proj"], **options}
    model = get_peft_model(model, LoraConfig(**config))
    randomize(model)
    return model


def counted(monkeypatch):
    calls = []
    inner = qk.LinearNF4.forward_lora_group
    monkeypatch.setattr(
        qk.LinearNF4,
        "forward_lora_group",
        staticmethod(lambda layers, *a: calls.append(len(layers)) or inner(layers, *a)),
    )
    return calls


def gradients(model, x, run=None):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_same(actual, expected):
    """Return y, then gradients."""
    for a, e in zip(actual, expected, strict=True):
        assert_same_function(a, e)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_model_computes_as_before(monkeypatch, kind):
    model, inputs = make(kind), batch(kind)
    qk.replace_linear(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize(model)
    keys = list(model.state_dict())
    expected = logits(model, inputs)
    expected.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    names = qk.fuse_shared_input(model)
    calls = counted(monkeypatch)
    actual = logits(model, inputs)
    actual.square().mean().backward()
    assert calls == {"llama": [3, 2] * 2, "bert": [3] * 2}[kind]
    assert all(len(group) in (2, 3) for group in names)
    assert list(model.state_dict()) == keys
    assert_same_function(actual, expected)
    assert_same_gradients({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, grads)


def test_unfused_layers_compute_as_before():
    model, x = small(), torch.randn(5, 32)
    expected = gradients(model, x)
    qk.fuse_shared_input(model)
    assert_same(gradients(model, x), expected)
    qk.unfuse_shared_input(model)
    assert_same(gradients(model, x), expected)


def test_one_mask_for_the_group(monkeypatch):
    """With dropout, the group equals the single layers with the group's seed."""
    model, x = small(dropout=0.4), torch.randn(5, 32)
    seed = torch.tensor([99])
    for module in ("qlora_kernels.nn.linear_nf4",):
        monkeypatch.setattr(f"{module}.seed_for", lambda p, device: seed if p else None)
    expected = gradients(model, x)
    qk.fuse_shared_input(model)
    assert_same(gradients(model, x), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    """Also if the checkpoint's input is the tensor that the layers read, with dropout replayed."""
    model, x = small(dropout=0.3), torch.randn(5, 32)
    qk.fuse_shared_input(model)
    blocks = model.base_model

    def run(x):
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    torch.manual_seed(3)
    expected = gradients(model, x)
    torch.manual_seed(3)
    assert_same(gradients(model, x, run), expected)


def test_compiles_in_one_graph():
    model, x = small(), torch.randn(5, 32)
    expected = gradients(model, x)
    qk.fuse_shared_input(model)
    assert_same(gradients(model, x, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


def test_the_compiled_graph_holds_one_op_for_each_group():
    model, x = small(), torch.randn(5, 32)
    qk.fuse_shared_input(model)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "linear_nf4" in str(node.target))
        return graph.forward

    torch.compile(model, backend=backend, fullgraph=True)(x)
    assert [name.split(".")[1] for name in seen] == ["linear_nf4_lora_group", "linear_nf4", "linear_nf4_lora_group"]


def test_fusion_dropped_with_warning_on_different_inputs(monkeypatch):
    model, x, other = small(), torch.randn(5, 32), torch.randn(5, 32)
    parent = model.base_model[0]
    expected = parent(x, other)
    qk.fuse_shared_input(model)
    calls = counted(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"0.k_proj does not read the tensor that .*0.q_proj read before it"):
        assert torch.equal(parent(x, other)[:, 48:], expected[:, 48:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_function(parent(x, other), expected)
    assert calls == [3]


def test_modified_input_is_recomputed(monkeypatch):
    model, x = small(), torch.randn(5, 32)
    parent = model.base_model[0]
    with torch.no_grad():
        expected = parent.k_proj(x + 1)
        qk.fuse_shared_input(model)
        parent.q_proj(x)
        x.add_(1)
        assert torch.equal(parent.k_proj(x), expected)


def test_change_of_grad_mode_recomputes():
    model, x = small(), torch.randn(5, 32)
    parent = model.base_model[0]
    qk.fuse_shared_input(model)
    with torch.no_grad():
        parent.q_proj(x)
    assert parent.k_proj(x).requires_grad


def test_outputs_are_released_after_last_use():
    model, x = small(), torch.randn(5, 32)
    qk.fuse_shared_input(model)
    model(x)
    shared = model.base_model[0].q_proj.fused_projections
    assert shared._shares is None
    model.base_model[0].q_proj(x)
    assert shared._shares is not None  # as after an exception between the calls
    model(x)
    assert shared._shares is None
    with torch.inference_mode():
        model(x)


def test_second_call_recomputes():
    model, x = small(dropout=0.5), torch.randn(5, 32)
    parent = model.base_model[0]
    qk.fuse_shared_input(model)
    parent.q_proj(x)
    assert not torch.equal(parent.k_proj(x), parent.k_proj(x))


def test_fused_group_falls_back_when_adapters_change(monkeypatch):
    """Calls that a group does not support run unfused; several adapters with one dropout rate run fused."""
    model, x = small(), torch.randn(5, 32)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    randomize(model)
    plain = copy.deepcopy(model)
    qk.fuse_shared_input(model)
    calls = counted(monkeypatch)

    def both(change):
        results = []
        for each in (plain, model):
            with torch.no_grad():
                results.append(change(each))
        assert_same_function(*results)

    def with_adapters(names):
        return lambda m: (m.set_adapter(names), m(x))[1]

    both(with_adapters(["default", "second"]))
    assert calls == [3, 3]
    both(with_adapters("second"))  # v has no such adapter
    assert calls == [3, 3]
    both(
        lambda m: (
            m.set_adapter("default"),
            m(x, adapter_names=["default", "second", "__base__", "second", "default"]),
        )[1]
    )
    both(lambda m: (m.merge_adapter(), m(x), m.unmerge_adapter())[1])
    with model.disable_adapter():
        model(x)
    assert calls == [3, 3]
    both(lambda m: (m.delete_adapter("second"), m(x))[1])
    assert calls == [3, 3, 3, 3]
    assert not any(hasattr(m, "fused_projections") for m in model.unload().modules())


def test_copy_of_fused_model_is_independent(monkeypatch):
    model, x = small(), torch.randn(5, 32)
    qk.fuse_shared_input(model)
    twin = copy.deepcopy(model)
    calls = counted(monkeypatch)
    assert_same_function(twin(x), model(x))
    assert calls == [3, 3, 3, 3]
    assert twin.base_model[0].q_proj.fused_projections.layers[0] is twin.base_model[0].q_proj


def test_refuses_a_model_without_siblings():
    model = nn.Sequential(nn.Linear(32, 32))
    qk.replace_linear(model, skip=())
    with pytest.raises(ValueError, match="must have two or more LoRA layers over LinearNF4 side by side"):
        qk.fuse_shared_input(get_peft_model(model, LoraConfig(target_modules=["0"])))


def test_autocast():
    model, x = small(), torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        qk.fuse_shared_input(model)
        assert_same_function(model(x), expected)
    assert expected.dtype == torch.bfloat16
