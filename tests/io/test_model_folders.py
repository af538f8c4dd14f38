"""Folders of many model families: quantized and loaded with transformers' names, refused if they are incomplete."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_kernels import LinearNF4, replace_linear
from qlora_kernels.integrations.transformers import ModelError, linear_layers, load_model, quantize_model
from qlora_kernels.io.streaming import tensor_shapes
from tests.support.tiny_model import write_tiny_llama
from tests.support.tolerances import assert_same_function

IDS = torch.arange(3, 10)[None]
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ALL = {**SIZES, **HEADS}


def gemma3() -> transformers.PreTrainedConfig:
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    text = transformers.Gemma3TextConfig(**ALL, head_dim=16)
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "mixtral": (lambda: transformers.MixtralConfig(**ALL, num_local_experts=4), 8),  # experts one by one in the files
    "qwen3-moe": (lambda: transformers.Qwen3MoeConfig(**ALL, head_dim=16, **EXPERTS), 8),
    "gpt-oss": (lambda: transformers.GptOssConfig(**ALL, head_dim=16, num_local_experts=4), 8),
    "gemma3-multimodal": (gemma3, 14 + 8),  # the files name the language model's modules otherwise
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=32), 8),
    "phi3": (lambda: transformers.Phi3Config(**ALL, pad_token_id=0), 8),  # q, k and v in one layer
    "gemma2": (lambda: transformers.Gemma2Config(**ALL, head_dim=16), 14),
    "opt": (lambda: transformers.OPTConfig(**SIZES, ffn_dim=96, num_attention_heads=4, word_embed_proj_dim=64), 12),
    # Its output head is called `head`. It rescales weights in place, which NF4 refuses, unless told not to.
    "rwkv": (lambda: transformers.RwkvConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, rescale_every=0), 14),
    "bloom": (lambda: transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4), 8),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Return (a model, its folder, the number of layers to quantize)."""
    make, layers = FAMILIES[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make()).eval()
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return model, folder, layers


def test_dense_folder_is_loaded_bit_for_bit(family):
    model, folder, _ = family
    loaded, state = load_model(folder, torch.float32), model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert_same_function(logits(loaded), logits(model))


def test_quantized_folder_equals_replace_linear(family, tmp_path):
    model, folder, layers = family
    report = quantize_model(folder, tmp_path, compute_dtype=torch.float32)
    assert len(report.quantized) == layers
    loaded = load_model(tmp_path, torch.float32)
    assert sum(isinstance(module, LinearNF4) for module in loaded.modules()) == layers
    replaced = load_model(folder, torch.float32)
    head = next((n for n, m in replaced.named_modules() if m is replaced.get_output_embeddings()), "lm_head")
    kept = [head, *(n for n, _ in replaced.named_modules() if n.endswith("head.attention.out_proj"))]
    replace_linear(replaced, skip=kept, compute_dtype=torch.float32)
    state = replaced.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert_same_function(logits(loaded), logits(replaced))
    error = (logits(loaded) - logits(model)).norm() / logits(model).norm()
    assert 0 < error < 0.35
    assert type(loaded) is type(replaced)
    assert loaded.state_dict().keys() == replaced.state_dict().keys()


def test_transformers_with_bitsandbytes_loads_them(family, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, folder, _ = family
    if model.config.model_type in ("rwkv", "gpt_oss"):
        pytest.skip("transformers loads no 4-bit folder of this family itself")
    quantize_model(folder, tmp_path, compute_dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = {name: module for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"}
    ours = {name: m for name, m in load_model(tmp_path, torch.float32).named_modules() if isinstance(m, LinearNF4)}
    assert found.keys() == ours.keys()
    for name, layer in ours.items():
        assert torch.equal(found[name].weight.reshape(-1), layer.packed.reshape(-1)), name
        assert found[name].weight.quant_state.shape == layer.weight.shape, name


@pytest.fixture
def folder(tmp_path):
    return write_tiny_llama(tmp_path / "dense", tied=False)


def rewritten(folder, change):
    """Apply `change` to the tensors of the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_missing_tensor_is_named(folder, tmp_path, name, quantized):
    if quantized:
        (tmp_path / "nf4").mkdir()
        quantize_model(folder, tmp_path / "nf4")
        folder = tmp_path / "nf4"

    def drop(tensors):
        for key in [key for key in tensors if key == name or key.startswith(f"{name}.")]:
            del tensors[key]

    rewritten(folder, drop)
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_model(folder)
    if not quantized:
        (tmp_path / "target").mkdir()
        with pytest.raises(ModelError, match=f"{name} is missing"):
            quantize_model(folder, tmp_path / "target")
        assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_another_head_is_refused(tmp_path, tied):
    """A classifier's folder is not a language model: its head would be random, or the embedding's."""
    config = transformers.LlamaConfig(**ALL, num_labels=3, pad_token_id=0, tie_word_embeddings=tied)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"score\.weight too"):
        load_model(tmp_path)


def test_errors_name_wrong_elements(folder):
    def shorten(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)

    rewritten(folder, shorten)
    with pytest.raises(ModelError, match=r"got model\.layers\.7.* too; model\.norm\.weight is \[5\], must be \[64\]"):
        load_model(folder)


def test_an_nf4_layer_of_another_size_is_refused(folder, tmp_path):
    (tmp_path / "nf4").mkdir()
    quantize_model(folder, tmp_path / "nf4")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    for field, value, message in (
        ("intermediate_size", 64, r"down_proj\.weight is \[64, 96\], must be \[64, 64\]"),
        ("head_dim", 2**40, r"q_proj\.weight is \[64, 64\], must be "),
    ):
        (tmp_path / "nf4" / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / "nf4")


def test_tensor_names_without_base_model_prefix(folder):
    """The files of a base model saved alone, with a head."""
    expected = logits(load_model(folder))

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    assert_same_function(logits(load_model(rewritten(folder, strip))), expected)


def test_model_structure_allocates_no_memory(folder):
    config = json.loads((folder / "config.json").read_text())
    for field, value, message in (
        ("hidden_size", 2**30, "must be"),
        ("vocab_size", 2**45, "must be"),
        ("intermediate_size", 2**70, "must"),
        ("num_hidden_layers", 10**9, "num_hidden_layers must be at most 4096"),
        ("num_hidden_layers", 3, r"model\.layers\.2\..* missing"),
        ("num_attention_heads", 0, "must"),
        ("num_attention_heads", "four", "must"),
        ("hidden_size", -1, "must"),
        ("rope_parameters", 3, "must"),
        ("model_type", "magic", "must describe a causal language model"),
        ("model_type", ["llama"], "must describe a causal language model"),
        ("model_type", "vit", "must describe a causal language model"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ModelError, match=message):
            load_model(folder)


def test_no_code_of_a_folder_is_run(tmp_path, monkeypatch):
    """No question about it is asked either."""
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked"))
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    for function in (linear_layers, load_model):
        with pytest.raises(ValueError, match="must"):
            function(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_index_and_pickles(folder):
    shapes = tensor_shapes(folder)
    index = folder / "model.safetensors.index.json"
    for weight_map in (["a"], {"a": "../model.safetensors"}, {"a": 3}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="weight_map must map"):
            load_model(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(shapes, "model.safetensors")}))
    assert isinstance(load_model(folder), nn.Module)
    index.unlink()
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_model(folder)


OLD_BUFFERS = {
    "llama": (
        lambda: transformers.LlamaConfig(**ALL, tie_word_embeddings=True),
        {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,), "model.position_ids": (1, 8)},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "gpt2": (
        FAMILIES["gpt2"][0],
        {"transformer.h.0.attn.bias": (1, 1, 32, 32), "transformer.h.0.attn.masked_bias": ()},
        {"lm_head.weight": "transformer.wte.weight"},
    ),
    "gpt-neo": (
        lambda: transformers.GPTNeoConfig(
            vocab_size=97, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        ),
        {"transformer.h.0.attn.attention.bias": (1, 1, 8, 8), "transformer.h.0.attn.attention.masked_bias": ()},
        {},
    ),
}


@pytest.mark.parametrize("old", OLD_BUFFERS)
def test_constants_of_older_checkpoints_are_ignored(tmp_path, old):
    """The tied head may be missing too, as in files of safetensors' writer; all other unexpected tensors are
    refused."""
    config, buffers, copies = OLD_BUFFERS[old]
    folder, quantized = tmp_path / "model", tmp_path / "nf4"
    model = transformers.AutoModelForCausalLM.from_config(config()).eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    extras = {**{n: torch.ones(s) for n, s in buffers.items()}, **{n: tensors[of].clone() for n, of in copies.items()}}
    save_file({**tensors, **extras}, folder / "model.safetensors", {"format": "pt"})
    assert_same_function(logits(load_model(folder, torch.float32)), logits(model))
    quantized.mkdir()
    quantize_model(folder, quantized)
    load_model(quantized)
    one_more = next(iter(buffers)).rpartition(".")[0] + ".gate"
    save_file({**tensors, one_more: torch.ones(8)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"got {one_more} too"):
        load_model(folder)
