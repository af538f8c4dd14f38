"""Each method compared with a few lines that implement its paper, on one layer if that is sufficient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_kernels import peft
from qlora_kernels.peft import PeftModel, get_peft_model
from qlora_kernels.peft.attention.prefix_slot import Prefix, Prefixes
from qlora_kernels.peft.layers.gate import Gate
from tests.peft.models import batch, heads, logits, make, randomize
from tests.support.tolerances import assert_same_function


def bert_layer(model: PeftModel):
    return model.base_model.bert.encoder.layer[0]


def attend(q, k, v, scale):
    return ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).transpose(1, 2).flatten(2)


def bert_reference(
    layer, x, *, attention=lambda h: h, ffn=lambda h: h, parallel=lambda x: 0.0, normed=lambda x: 0.0, prefix=None
):
    """Compute a BERT layer with a function after each sublayer and one parallel to the FFN.

    normed reads the layer's output and is added before its norm; prefix gives keys and values before the attention's.
    """
    self_attention, d = layer.attention.self, x.shape[-1]
    q, k, v = (heads(getattr(self_attention, name)(x)) for name in ("query", "key", "value"))
    if prefix is not None:
        k, v = (torch.cat([p.expand(x.shape[0], -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v), strict=True))
    a = attention(layer.attention.output.dense(attend(q, k, v, (d // 4) ** -0.5)))
    x = layer.attention.output.LayerNorm(x + a)
    u = x + ffn(layer.output.dense(F.gelu(layer.intermediate.dense(x)))) + parallel(x)
    norm = layer.output.LayerNorm
    return layer_norm(norm, u + normed(layer_norm(norm, u)))


def layer_norm(norm, x):
    """Compute without the hooks on the module."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def bottleneck(module, activation):
    return lambda h: F.linear(
        activation(F.linear(h, module.down.weight, module.down.bias)), module.up.weight, module.up.bias
    )


def test_houlsby():
    model = get_peft_model(make("bert"), peft.AdapterConfig(bottleneck_size=8)).eval()
    randomize(model)
    tree = model.injector.adapters["default"][0].tree
    places = [f"bert.encoder.layer.0.{place}_adapter" for place in ("attention", "ffn")]
    first, second = (bottleneck(tree[place], F.gelu) for place in places)
    x = torch.randn(2, 5, 32)
    expected = bert_reference(bert_layer(model), x, attention=lambda h: h + first(h), ffn=lambda h: h + second(h))
    assert_same_function(bert_layer(model)(x), expected, products=6)


def test_houlsby_starts_near_the_identity():
    model = get_peft_model(make("bert"), peft.AdapterConfig(bottleneck_size=64))
    weights = torch.cat(
        [p.flatten() for n, p in model.adapters.named_parameters() if n.endswith(("up.weight", "down.weight"))]
    )
    assert weights.abs().max() <= 2e-2
    assert 0.8e-2 < weights.std() < 1e-2  # a normal of 1e-2 cut at two of it
    assert all(not p.any() for n, p in model.adapters.named_parameters() if n.endswith(("up.bias", "down.bias")))
    assert sum("LayerNorm" in n for n, _ in model.adapters.named_parameters()) == 2 * 2 * 2


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_pfeiffer_and_parallel(placement):
    config = peft.AdapterConfig(placement=placement, bottleneck_size=8, scale=2.0, non_linearity="relu")
    model = get_peft_model(make("bert"), config).eval()
    randomize(model)
    f = bottleneck(model.injector.adapters["default"][0].tree["bert.encoder.layer.0.ffn_adapter"], F.relu)
    where = {"normed" if placement == "pfeiffer" else "parallel": lambda x: 2 * f(x)}
    x = torch.randn(2, 5, 32)
    assert_same_function(bert_layer(model)(x), bert_reference(bert_layer(model), x, **where), products=6)


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_equals_attention_over_prepended_keys_and_values(projection):
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=projection, encoder_hidden_size=16)
    model = get_peft_model(make("bert"), config).eval()
    encoder = model.injector.adapters["default"][0].prefixes["encoder"]
    rows = encoder.embedding.weight
    if projection:
        rows = encoder.up(torch.tanh(encoder.down(rows)))
    keys, values = (rows.view(3, 4, 4, 8)[:, i].transpose(0, 1) for i in (0, 1))  # layer 0: entries 0 and 1
    x = torch.randn(2, 5, 32)
    assert_same_function(bert_layer(model)(x), bert_reference(bert_layer(model), x, prefix=(keys, values)), products=6)


def test_mam_is_prefix_and_parallel_adapter():
    model = get_peft_model(make("bert"), peft.MAMConfig(prefix_length=3, bottleneck_size=8)).eval()
    randomize(model)
    prefix, adapter = model.injector.adapters["default"][0].parts
    f = bottleneck(adapter.tree["bert.encoder.layer.0.ffn_adapter"], F.relu)
    x = torch.randn(2, 5, 32)
    keys, values = prefix.prefixes["encoder"](0)
    expected = bert_reference(bert_layer(model), x, prefix=(keys, values), parallel=lambda x: 4 * f(x))
    assert_same_function(bert_layer(model)(x), expected, products=6)


def test_unipelt():
    config = peft.UniPELTConfig(prefix_length=3, prefix_hidden_size=16, lora_r=4, reduction_factor=4)
    model = get_peft_model(make("bert"), config).eval()
    randomize(model)
    lora, prefix, adapter = model.injector.adapters["default"][0].parts
    node = "bert.encoder.layer.0"
    f = adapter.tree[f"{node}.ffn_adapter"]
    small = bottleneck(f.bottleneck, F.relu)

    def gate(g, h):
        return torch.sigmoid(g.linear(h)).mean(1, keepdim=True)

    def project(name, x):
        base = bert_layer(model).attention.self.get_submodule(name).base_layer
        delta = lora.tree[f"{node}.attention.self.{name}"]
        return base(x) + gate(delta.gate, x) * delta.lora_B(delta.lora_A(x))

    x = torch.randn(2, 5, 32)
    layer = bert_layer(model)
    g = gate(prefix.tree[f"{node}.prefix_gate"], x)[..., None]
    q, k, v = heads(project("query", x)), heads(layer.attention.self.key(x)), heads(project("value", x))
    keys, values = prefix.prefixes["encoder"](0)
    context = attend(q, torch.cat([g * keys, k], 2), torch.cat([g * values, v], 2), 8**-0.5)
    y = layer.attention.output.LayerNorm(x + layer.attention.output.dense(context))
    norm, u = layer.output.LayerNorm, y + layer.output.dense(F.gelu(layer.intermediate.dense(y)))
    h = layer_norm(norm, u)
    expected = layer_norm(norm, u + gate(f.gate, h) * small(h))
    assert_same_function(layer(x), expected, products=4)


def test_gate_ignores_padding():
    gate = Gate(8, False, torch.device("cpu"), torch.float32)
    h, padding = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    alone = gate(h[:1, :3], None)
    assert_same_function(gate(h, padding)[:1], alone, products=4)


def test_gate_scales_only_its_querys_prefix():
    """Three prefixes, the second without a gate."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    gates = (torch.rand(2, 5, 1), None, torch.rand(2, 5, 1))
    parts = {str(i): Prefix(torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8), g) for i, g in enumerate(gates)}
    prefixes = Prefixes(parts)
    joined = F.scaled_dot_product_attention(*prefixes.join(q, k, v), scale=0.3).transpose(1, 2)
    factors = [torch.ones(2, 5, 1) if g is None else g for g in gates]
    scores = [g[:, None] * (q @ p.keys.transpose(-1, -2)) for g, p in zip(factors, parts.values(), strict=True)]
    *weights, own = (0.3 * torch.cat([*scores, q @ k.transpose(-1, -2)], -1)).softmax(-1).split((3, 3, 3, 6), dim=-1)
    expected = own @ v
    for g, w, p in zip(factors, weights, parts.values(), strict=True):
        expected = expected + g[:, None] * (w @ p.values)
    assert_same_function(prefixes.out(joined), expected.transpose(1, 2), products=4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "torch"])
def test_pfeiffer_where_layers_normalise_their_input(kind):
    """The stream after the FFN, u, becomes u + f(u), also in torch's layers."""
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval()
        inputs, path = {"input": torch.randn(2, 5, 32)}, "0.layers.0"
    else:
        model, inputs = make(kind), batch(kind)
        path = {"llama": "model.layers.0", "gpt2": "transformer.h.0", "t5": "encoder.block.0.layer.1"}[kind]
    block, streams = model.get_submodule(path), []

    def see():
        return block.register_forward_hook(lambda m, args, out: streams.append(out[0] if type(out) is tuple else out))

    handle = see()
    model(**inputs)
    handle.remove()
    wrapped = get_peft_model(model, peft.AdapterConfig(placement="pfeiffer", bottleneck_size=8)).eval()
    randomize(wrapped)
    see()
    model(**inputs)
    module = wrapped.injector.adapters["default"][0].tree[f"{path.removesuffix('.layer.1')}.ffn_adapter"]
    assert_same_function(streams[1], streams[0] + bottleneck(module, F.relu)(streams[0]), products=4)


def fused_model() -> PeftModel:
    model = PeftModel(make("bert")).eval()
    for i, name in enumerate(("a", "b")):
        model.add_adapter(name, peft.AdapterConfig(placement="pfeiffer", bottleneck_size=8))
        model.set_adapter(name)
        randomize(model, seed=i)
    model.add_adapter("fusion", peft.AdapterFusionConfig(adapters=("a", "b")))
    model.set_adapter("fusion")
    return model


def test_adapter_fusion():
    model = fused_model()
    fusion = model.injector.adapters["fusion"][0].tree["bert.encoder.layer.0.fusion"]
    assert torch.equal(fusion.value.weight.diagonal(), torch.ones(32))
    assert fusion.value.weight.sum().item() == pytest.approx(32 + (32 * 32 - 32) * 1e-6)
    assert model.train().peft_loss().item() == pytest.approx(2 * 0.01 * (32 * 32 - 32) * 1e-12)
    model.eval()
    randomize(model)
    trees = [model.injector.adapters[name][0].tree["bert.encoder.layer.0.ffn_adapter"] for name in ("a", "b")]
    f_a, f_b = (bottleneck(tree, F.relu) for tree in trees)

    def mix(h):
        z = torch.stack([f_a(h), f_b(h)])
        weights = (fusion.query(h) * fusion.key(z)).sum(-1).softmax(0)
        return (weights[..., None] * fusion.value(z)).sum(0)

    x = torch.randn(2, 5, 32)
    assert_same_function(bert_layer(model)(x), bert_reference(bert_layer(model), x, normed=mix), products=6)


def test_fusion_of_separately_trained_adapters(tmp_path):
    model, inputs = fused_model(), batch("bert")
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("bert"), tmp_path / "a", "a")
    with pytest.raises(ValueError, match="adapter 'b' must be in the model first"):
        again.load_adapter(tmp_path / "fusion", "fusion")
    again.load_adapter(tmp_path / "b", "b")
    again.load_adapter(tmp_path / "fusion", "fusion")
    again.set_adapter("fusion")
    assert_same_function(logits(again, inputs), expected)
    with pytest.raises(ValueError, match="must not be part of others"):
        again.delete_adapter("a")
    with pytest.raises(ValueError, match="must not be active beside"):
        again.set_adapter(["a", "fusion"])


def test_fusion_requires_pfeiffer_adapters():
    model = get_peft_model(make("bert"), peft.AdapterConfig(bottleneck_size=8), "a")
    with pytest.raises(ValueError, match="placement='pfeiffer'"):
        model.add_adapter("fusion", peft.AdapterFusionConfig(adapters=("a", "a2")))


def test_gemmas_sublayers_end_in_a_norm():
    """The norm's output is added to the stream, and a Houlsby adapter reads it."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 48}
    base = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    model = get_peft_model(base, peft.AdapterConfig(bottleneck_size=8)).eval()
    (layer,) = model.injector.layout.layers
    leaves = [path.rpartition(".")[2] for path in (layer.attention_output, layer.ffn_input, layer.ffn_output)]
    assert leaves == ["post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    start = logits(model, batch("llama"))
    randomize(model)
    assert not torch.allclose(logits(model, batch("llama")), start, atol=1e-3)


def test_bitfit_subset():
    model = get_peft_model(make("bert"), peft.BitFitConfig(biases="query+mlp"))
    names = {n.split(".", 2)[2] for n, p in model.adapters.named_parameters()}
    parts = ("attention.self.query.bias", "intermediate.dense.bias")
    assert names == {f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in parts}
    for kind, linears in (("llama", ("gate_proj", "up_proj")), ("gpt2", ("c_fc",)), ("t5", ("wi",))):
        model = get_peft_model(make(kind), peft.BitFitConfig(biases="query+mlp", add_missing=True))
        middle = {n.split(".")[-2] for n, _ in model.adapters.named_parameters()}
        assert middle - {"q_proj", "c_attn", "q"} == set(linears)


def test_bitfit_trains_biases_only():
    model = get_peft_model(make("bert"), peft.BitFitConfig())
    expected = {n for n, _ in make("bert").named_parameters() if n.endswith(".bias")}
    assert {n.split(".", 2)[2] for n, _ in model.adapters.named_parameters()} == expected
    for kind in ("llama", "t5"):  # T5's relative_attention_bias is an embedding
        with pytest.raises(ValueError, match="add_missing=True"):
            get_peft_model(make(kind), peft.BitFitConfig())
    model = get_peft_model(make("llama"), peft.BitFitConfig(add_missing=True))
    assert len(list(model.adapters.parameters())) == 14
    assert model.unload().model.layers[0].mlp.up_proj.bias is None


def test_merged_bitfit_keeps_its_biases():
    model, inputs = get_peft_model(make("llama"), peft.BitFitConfig(add_missing=True)), batch("llama")
    randomize(model)
    expected = logits(model, inputs)
    assert_same_function(logits(model.merge_and_unload(), inputs), expected)
