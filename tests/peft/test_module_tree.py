"""Adapters are in the module tree, so that code that iterates over, copies or replaces parts of a model is right."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from qlora_kernels.peft.layers.fused_projections import fuse_shared_input
from qlora_kernels.training.chunked_loss import ChunkedLoss
from tests.peft.cases import CASES, build
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function, assert_same_gradients

METHOD = pytest.mark.parametrize("case", CASES)


def replicated(network: nn.Module, change) -> nn.Module:
    """Replicate a network as torch.nn.parallel.replicate does, without devices.

    Modules are copied one by one, and every parameter becomes an attribute of its copy, here `change` of it.
    """
    modules = list(network.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    tensors = {id(p): change(p.detach()) for p in network.parameters()}
    for module, replica in copies.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, tensors[id(parameter)])
                replica._former_parameters[name] = tensors[id(parameter)]
    return copies[network]


@METHOD
@pytest.mark.parametrize("kind", ["llama", "t5", "torch"])
def test_replicas_compute_with_their_own_parameters(case, kind):
    """A replica with changed parameters equals a copy with the same change, also in a thread of its own."""
    model, inputs = build(case, kind), batch(kind, rows=2)
    randomize(model)

    def change(p):
        return p * 0.9 + 0.01 if p.is_floating_point() else p

    with torch.no_grad():
        logits(model, inputs)  # values of this call must not be kept for the replicas
        replica = replicated(model, change)
        changed = copy.deepcopy(model)
        for parameter in changed.parameters():
            parameter.copy_(change(parameter))
        expected, disabled = logits(changed, inputs), None
        with changed.disable_adapter():
            disabled = logits(changed, inputs)
        assert_same_function(logits(replica, inputs), expected)
        with model.disable_adapter():
            silent = replicated(model, change)
        found = []

        def run():
            with torch.no_grad():
                found.append(logits(silent, inputs))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert_same_function(found[0], disabled)


@METHOD
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_every_parameter_is_in_the_tree_once(case, kind):
    model = build(case, kind)
    trained = {id(p) for p in model.adapters["default"].parameters()}
    names = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    assert set(names.values()) == trained
    assert len(names) == len(trained)
    prompts = {id(p) for p in model.prompt_encoder.parameters()}
    assert {id(p) for p in model.base_model.parameters() if p.requires_grad} == trained - prompts
    state = model.state_dict()
    assert all(name in state for name in names)


def test_module_parameters_are_those_used_in_forward():
    model = get_peft_model(
        make("llama", nf4=True), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all")
    )
    layer = model.base_model.model.layers[0].self_attn
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "q_proj.deltas.default.lora_A.weight",
        "q_proj.deltas.default.lora_B.weight",
    }
    assert {n for n, p in model.base_model.lm_head.named_parameters() if p.requires_grad} == {
        "overrides.default.weight"
    }
    for case, path, module in (
        ("pfeiffer", "ffn_adapter", lambda m: m.model.layers[0]),
        ("parallel", "ffn_adapter", lambda m: m.model.layers[0].mlp),
        ("houlsby", "attention_adapter", lambda m: m.model.layers[0].self_attn.o_proj),
        ("fusion", "adapter_fusion", lambda m: m.model.layers[0]),
        ("prefix_tuning", "prefix_slot", lambda m: m.model.layers[0].self_attn),
        ("unipelt", "prefix_slot", lambda m: m.model.layers[1].self_attn),
    ):
        children = dict(module(build(case, "llama").base_model).named_children())
        assert any(p.requires_grad for p in children[path].parameters()), case


def test_hooks_on_the_factors_fire():
    model = get_peft_model(make("llama", nf4=True), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model.eval(), batch("llama"))
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("lora_A", "lora_B")):
            module.register_forward_hook(lambda module, args, y, name=name: seen.append(name))
    assert_same_function(logits(model, batch("llama")), expected)
    assert len(seen) == 4
    assert "hooks watch" in model.explain()["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("options", ["alone", "rows", "fuse_shared_input"])
def test_hooks_of_a_quantized_layer_act_below_its_adapters(options, use_dora):
    """A hook on the layer below the adapters changes the output to which the updates are added."""
    targets = ["q_proj", "k_proj", "v_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=use_dora)
    model = get_peft_model(make("llama", nf4=True), config).eval()
    calls = {"adapter_names": ["default"] * len(batch("llama")["input_ids"])} if options == "rows" else {}
    if options == "fuse_shared_input":
        fuse_shared_input(model)
    layer = model.base_model.model.layers[0].self_attn.k_proj
    handle = layer.base_layer.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
    outputs = []
    layer.register_forward_hook(lambda module, args, y: outputs.append((args[0], y)))
    with torch.no_grad():
        model(**batch("llama"), **calls)
        x, y = outputs[0]
        expected = layer.deltas["default"](x, torch.zeros_like(y), layer.base_layer, layer.base_layer.bias)
    assert_same_function(y, expected)
    assert "hooks watch" in model.explain()["model.layers.0.self_attn.k_proj"] or use_dora
    handle.remove()
    with torch.no_grad():
        model(**batch("llama"), **calls)
    assert not torch.allclose(outputs[1][1], y)


@pytest.mark.parametrize("options", ["alone", "rows", "fuse_shared_input", "fuse_model"])
def test_hooks_of_all_modules_reach_the_modules_below_an_adapted_layer(options):
    """Profilers and counters of operations register hooks for all modules."""
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(make("llama", nf4=True), config).eval()
    calls = {"adapter_names": ["default"] * len(batch("llama")["input_ids"])} if options == "rows" else {}
    if options.startswith("fuse"):
        {"fuse_shared_input": fuse_shared_input, "fuse_model": qk.fuse_model}[options](model)
    layer = model.base_model.model.layers[0].self_attn.k_proj
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.add(module))
    try:
        with torch.no_grad():
            watched = model(**batch("llama"), **calls).logits
    finally:
        handle.remove()
    assert {layer, layer.base_layer, layer.deltas["default"].lora_A, layer.deltas["default"].lora_B} <= seen
    with torch.no_grad():
        assert_same_function(model(**batch("llama"), **calls).logits, watched)


@pytest.mark.parametrize("how", ["lora", "modules_to_save"])
def test_chunked_loss_trains_an_adapted_head(how):
    options = {"target_modules": ["lm_head"], "init_lora_weights": False}
    if how == "modules_to_save":
        options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(make("llama"), LoraConfig(r=2, **options))
    inputs = batch("llama")
    from qlora_kernels.training.batches import Batch

    part = Batch(inputs["input_ids"], inputs["input_ids"], inputs["attention_mask"])
    ChunkedLoss(model, chunk=4)(part).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n}
    model.zero_grad()
    y = logits(model, inputs)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(y, inputs["input_ids"][:, 1:].flatten(), reduction="sum").backward()
    assert got
    assert_same_gradients(got, {name: p.grad for name, p in model.named_parameters() if name in got})


def test_a_recurrent_module_is_overridden():
    """A recurrent module reads its parameters from a list of its own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.out(self.lstm(x)[0])

    base, x = Net(), torch.randn(2, 3, 8)
    before = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=["out"], modules_to_save=["lstm"]))
    assert_same_function(model(x), before)
    randomize(model)
    changed = model(x)
    changed.sum().backward()
    assert all(p.grad is not None for p in base.lstm.overrides.parameters())
    with model.disable_adapter():
        assert_same_function(model(x), before)
    assert_same_function(copy.deepcopy(model)(x), changed)
    assert type(model.unload().lstm) is nn.LSTM
    assert_same_function(base(x), before)


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("targets", [["enc", "dec"], ["enc"], ["dec"]])
def test_one_layer_under_two_names(nf4, targets, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Linear(16, 16)
            self.dec, self.out = self.enc, nn.Linear(16, 4)

        def forward(self, x):
            return self.out(torch.relu(self.dec(torch.relu(self.enc(x)))))

    def fresh():
        torch.manual_seed(0)
        net = Net()
        if nf4:
            qk.replace_linear(net)
        return net

    net, x = fresh(), torch.randn(5, 16)
    before = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    assert net.enc is net.dec
    assert len(list(model.adapters.parameters())) == 2
    changed = model(x)
    model.save_pretrained(tmp_path)
    assert_same_function(PeftModel.from_pretrained(fresh(), tmp_path)(x), changed)
    assert_same_function(copy.deepcopy(model).merge_and_unload()(x), changed)
    assert model.unload().enc is net.dec
    assert_same_function(net(x), before)


def test_embedding_used_only_through_tied_ones_is_refused():
    with pytest.raises(ValueError, match=r"shared must be called by the model, which calls encoder.embed_tokens, deco"):
        get_peft_model(make("t5"), LoraConfig(target_modules=["shared"]))
    model = get_peft_model(make("t5"), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    assert not torch.equal(logits(model, batch("t5")), logits(make("t5"), batch("t5")))


@pytest.mark.parametrize(
    ("nf4", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)], ids=str
)
def test_multihead_attention_is_restored(nf4, dtype):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)
    if nf4:
        qk.replace_linear(encoder)
    attention, seen, x = encoder.layers[0].self_attn, [], torch.randn(2, 5, 32)
    attention.register_forward_hook(lambda *_: seen.append("hook"))
    names, nested, before = list(encoder.state_dict()), encoder.use_nested_tensor, encoder(x)
    for targets in (["out_proj"], ["q_proj", "v_proj"], ["linear1"]):
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(encoder), config).eval().to(dtype)
        expected = model(x.to(dtype))
        merged = model.merge_and_unload()
        assert type(merged.layers[0].self_attn) is nn.MultiheadAttention
        assert_same_function(merged(x.to(dtype)), expected, products=6)  # 4 of the attention and 2 of the layer
    model = get_peft_model(encoder, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    seen.clear()
    model(x)
    assert seen == ["hook"]
    assert model.unload().layers[0].self_attn is attention
    assert list(encoder.state_dict()) == names
    assert encoder.use_nested_tensor == nested
    assert_same_function(encoder(x), before)
    assert encoder.layers[0].self_attn.in_proj_weight.shape == (96, 32)


def test_adapters_are_not_counted_as_model_layers():
    """Neither a second adapter nor replace_linear changes the layers of the first."""
    model = get_peft_model(make("llama"), LoraConfig(target_modules="all-linear"))
    adapted = set(model.injector.adapted_layers())
    model.add_adapter("second", LoraConfig(target_modules="all-linear"))
    assert set(model.injector.adapted_layers()) == adapted
    qk.replace_linear(model)
    layer = model.injector.adapted_layers()["model.layers.0.self_attn.q_proj"]
    assert type(layer.base_layer) is qk.LinearNF4
    assert type(layer.deltas["default"].lora_A) is nn.Linear


def test_failed_add_adapter_is_rolled_back():
    base = make("bert")
    names, inputs = list(base.state_dict()), batch("bert")
    before = logits(base, inputs)
    model = PeftModel(base)
    lora = LoraConfig(target_modules=["query"], modules_to_save=["pooler"])
    with pytest.raises(ValueError, match="must update"):
        model.add_adapter("default", [lora, LoraConfig(target_modules=["query"])])
    assert list(base.state_dict()) == names
    assert_same_function(logits(model, inputs), before)
    with pytest.raises(ValueError, match=r"must be no attribute of nn.ModuleDict, got 'keys'"):
        model.add_adapter("keys", lora)
