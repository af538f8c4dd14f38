"""GGUF files read back: by the gguf package, value by value, and by transformers, as the same model and tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora_kernels.integrations.gguf_export import ARCHITECTURES, write_model_gguf
from qlora_kernels.integrations.model_folders import ModelError
from tests.support.tiny_tokenizers import tiny_tokenizer

from .gguf_files import CLASSES, LLAMA3, fields, random_model, read_by_transformers, tensors


def test_every_architecture_has_a_case():
    assert CLASSES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_weights(tmp_path, kind, tied):
    # transformers reads no head_dim of Qwen3 from a GGUF file and takes 128.
    changes = {"head_dim": 128} if kind == "qwen3" else {}
    model = random_model(kind, tiny_tokenizer("gpt2"), tie_word_embeddings=tied, **changes)
    write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"), "f32")
    again = read_by_transformers(tmp_path / "m.gguf").state_dict()
    state = model.state_dict()
    assert again.keys() == state.keys()
    assert [name for name in state if not torch.equal(again[name], state[name])] == []
    has_output = "output.weight" in tensors(tmp_path / "m.gguf")
    assert has_output != tied
    values = fields(tmp_path / "m.gguf")
    architecture = ARCHITECTURES[kind]
    assert values["general.architecture"] == architecture
    assert values[f"{architecture}.attention.head_count_kv"] == 2
    assert values[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert values[f"{architecture}.rope.freq_base"] == model.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_values_are_those_of_the_model_within_the_format(tmp_path, outtype):
    model = random_model("qwen3", tiny_tokenizer("gpt2"))
    write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"), outtype)
    got = tensors(tmp_path / "m.gguf")
    layer = model.model.layers[1]
    pairs = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output.weight": model.lm_head.weight,
        "blk.1.attn_q.weight": layer.self_attn.q_proj.weight,
        "blk.1.attn_k.weight": layer.self_attn.k_proj.weight,
        "blk.1.attn_output.weight": layer.self_attn.o_proj.weight,
        "blk.1.ffn_gate.weight": layer.mlp.gate_proj.weight,
        "blk.1.ffn_up.weight": layer.mlp.up_proj.weight,
        "blk.1.ffn_down.weight": layer.mlp.down_proj.weight,
    }
    for name, weight in pairs.items():
        value = torch.tensor(np.array(got[name]))
        if outtype == "q8_0":
            largest = weight.detach().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
            bound = (largest / 127 * (0.5 + 127 * 2.0**-11)).expand(-1, -1, 32).flatten(-2) + 1e-7
        else:
            # Subnormal numbers of fp16 have a spacing of 2**-24.
            bound = weight.abs() * (2.0**-11 if outtype == "f16" else 2.0**-8) + 2.0**-25
        assert ((value - weight).abs() <= bound).all(), name
    for name in ("blk.0.attn_q_norm.weight", "blk.0.attn_norm.weight", "output_norm.weight"):
        assert got[name].dtype == np.float32
    assert np.array_equal(got["output_norm.weight"], model.model.norm.weight.detach().numpy())
    assert fields(tmp_path / "m.gguf")["qwen3.attention.key_length"] == 16


def test_scaling_of_llama_3_divides_each_frequency(tmp_path):
    tokenizer = tiny_tokenizer("gpt2")
    model = random_model("llama", tokenizer, rope_parameters=LLAMA3)
    write_model_gguf(tmp_path / "m.gguf", model, tokenizer, "f32")
    factors = torch.tensor(np.array(tensors(tmp_path / "m.gguf")["rope_freqs.weight"]))
    plain = 5e5 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq.double(), rtol=1e-6, atol=0)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    other = random_model("llama", tokenizer, rope_parameters=dynamic)
    with pytest.raises(ModelError, match="rope_type must be default, linear or llama3, got dynamic"):
        write_model_gguf(tmp_path / "other.gguf", other, tokenizer)


@pytest.mark.parametrize(
    ("kind", "changes", "length"),
    [
        ("mistral", {"sliding_window": 8}, 8),
        ("mistral", {"sliding_window": None}, 128),
        ("mistral", {"sliding_window": 4096}, 128),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 8),
        ("qwen2", {"sliding_window": 8}, 128),
    ],
    ids=str,
)
def test_a_sliding_window_limits_the_context(tmp_path, kind, changes, length):
    model = random_model(kind, tiny_tokenizer("gpt2"), **changes)
    write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"))
    assert fields(tmp_path / "m.gguf")[f"{ARCHITECTURES[kind]}.context_length"] == length


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ("qwen3", {"attention_bias": True}, r"model.layers.0.self_attn.q_proj.bias must not exist"),
    ],
    ids=str,
)
def test_functions_unsupported_by_llama_cpp_are_refused(tmp_path, kind, changes, words):
    model = random_model(kind, tiny_tokenizer("gpt2"), **changes)
    with pytest.raises(ModelError, match=words):
        write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"))


def test_fp16_has_a_range(tmp_path):
    model = random_model("llama", tiny_tokenizer("gpt2"))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = -1e5
    with pytest.raises(ModelError, match=r"output.weight must be within the range of fp16.*use --outtype bf16"):
        write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"), "f16")
    write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"), "bf16")
