"""GGUF files read back: by the gguf package, value by value, and by transformers, as the same model and tokenizer."""

from __future__ import annotations

import copy
import json
import warnings

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from qlora_kernels.cli import main
from qlora_kernels.integrations.adapter_export import lora_factors
from qlora_kernels.integrations.gguf_export import ARCHITECTURES, write_lora_gguf, write_model_gguf
from qlora_kernels.integrations.model_folders import ModelError, load_model, load_tokenizer
from qlora_kernels.peft import LoraConfig, get_peft_model
from tests.support.tiny_model import LINEARS, write_tiny_llama
from tests.support.tiny_tokenizers import TEXT, tiny_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
IDS = torch.arange(5, 25).view(1, 20)
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_model(kind: str, tokenizer, **changes):
    config = getattr(transformers, f"{CLASSES[kind]}Config")(vocab_size=len(tokenizer), **{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # also biases and norms, which begin as 0 and 1
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.eval()


def tensors(path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def fields(path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def read_by_transformers(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


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


@pytest.mark.filterwarnings("ignore:.*puts a space before a text")
@pytest.mark.parametrize("family", ["gpt2", "llama2", "mistral"])
def test_tokenizer_reads_back(tmp_path, family):
    tokenizer = copy.copy(tiny_tokenizer(family))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    values = fields(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert values["tokenizer.ggml.add_bos_token"] == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    kinds = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<|im_end|>"] == gguf.TokenType.CONTROL
    if family == "gpt2":
        assert values["tokenizer.ggml.pre"] == "gpt-2"
        for text in TEXT:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    else:
        assert kinds["<0x0A>"] == gguf.TokenType.BYTE


@pytest.mark.parametrize(("family", "words"), [("unigram", "must be of type BPE"), ("python", "must be a fast one")])
def test_tokenizers_that_are_refused(tmp_path, family, words):
    tokenizer = tiny_tokenizer(family)
    with pytest.raises(ModelError, match=words):
        write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)


def test_another_way_to_split_a_text_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    tokenizer = copy.deepcopy(tiny_tokenizer("gpt2"))
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    with pytest.raises(ModelError, match="must split texts as GPT-2, Llama 3, Qwen 2 or SmolLM do"):
        write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)


def test_other_whitespace_is_reported(tmp_path):
    model = random_model("llama", tiny_tokenizer("llama2"))
    for family, words in (("llama2", "at the beginning of a text"), ("mistral", "after special tokens")):
        with pytest.warns(UserWarning, match=f"this tokenizer puts one .*{words}"):
            write_model_gguf(tmp_path / family, model, tiny_tokenizer(family))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("llama2-legacy", "gemma"):
            write_model_gguf(tmp_path / family, model, tiny_tokenizer(family))


def test_tokens_without_merge_are_refused(tmp_path):
    """llama.cpp makes such a word one token for Llama 3 and several for the others."""
    tokenizer = copy.deepcopy(tiny_tokenizer("gpt2"))
    model = random_model("llama", tokenizer)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["merges"].pop()
    for ignore_merges in (False, True):
        description["model"]["ignore_merges"] = ignore_merges
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(description))
        if ignore_merges:
            with pytest.raises(
                ModelError, match="ignore_merges must be False in a tokenizer that splits as gpt-2 does"
            ):
                write_model_gguf(tmp_path / "m.gguf", model, tokenizer)
        else:
            write_model_gguf(tmp_path / "m.gguf", model, tokenizer)
    description["model"]["end_of_word_suffix"] = "</w>"
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(description))
    with pytest.raises(ModelError, match="must have no end_of_word_suffix, got '</w>'"):
        write_model_gguf(tmp_path / "m.gguf", model, tokenizer)


def test_chat_templates_by_name(tmp_path):
    tokenizer = copy.copy(tiny_tokenizer("gpt2"))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)
    values = fields(tmp_path / "m.gguf")
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    assert values["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_a_model_without_a_name_in_gguf_is_refused(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=400))
    with pytest.raises(ModelError, match="the model must be one of llama, mistral, qwen2, qwen3, got gpt2"):
        write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a dense folder, an adapter with its own rank and alpha for one layer)."""
    root = tmp_path_factory.mktemp("trained")
    folder = write_tiny_llama(root / "model", dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 12}
    )
    adapted = get_peft_model(load_model(folder, torch.float32), config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(root / "adapter")
    return folder, root / "adapter"


def export(*options, code=0) -> None:
    assert main(["export", *map(str, options)]) == code


def test_merged_and_lora_files_agree(trained, tmp_path):
    """The merged file minus the base's is the LoRA file's product, in llama.cpp's order of rows, for each layer."""
    folder, adapter = trained
    options = ["--model", folder, "--dense", "--compute-dtype", "fp32", "--outtype", "f32"]
    export(*options, "--gguf", tmp_path / "base.gguf")
    export(*options, "--adapter", adapter, "--gguf", tmp_path / "merged.gguf")
    export(*options, "--adapter", adapter, "--lora-gguf", tmp_path / "lora.gguf")
    base, merged, lora = (tensors(tmp_path / f"{name}.gguf") for name in ("base", "merged", "lora"))
    values = fields(tmp_path / "lora.gguf")
    assert (values["general.type"], values["adapter.type"], values["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    alpha = values["adapter.lora.alpha"]
    assert alpha == 6
    layers = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert len(layers) == LINEARS
    for layer in layers:
        A, B = lora[f"{layer}.lora_a"], lora[f"{layer}.lora_b"]
        product = alpha / len(A) * (B.astype(np.float64) @ A.astype(np.float64))
        np.testing.assert_allclose(merged[layer] - base[layer], product, rtol=0, atol=2e-6)
        assert np.abs(product).max() > 0.05
    assert lora["blk.0.attn_q.weight.lora_a"].shape == (2, 64)
    again = read_by_transformers(tmp_path / "merged.gguf")
    from qlora_kernels.peft import PeftModel

    adapted = PeftModel.from_pretrained(load_model(folder, torch.float32), adapter)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)


def test_lora_tensors_are_the_adapters_own(trained, tmp_path):
    """Outside q and k, whose rows are reordered, and the layer with its own alpha, the very same numbers."""
    folder, adapter = trained
    export("--model", folder, "--adapter", adapter, "--lora-gguf", tmp_path / "lora.gguf")
    lora, own = tensors(tmp_path / "lora.gguf"), load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj"
    assert np.array_equal(lora["blk.1.ffn_up.weight.lora_a"], own[f"{name}.lora_A.weight"].numpy())
    assert np.array_equal(lora["blk.1.ffn_up.weight.lora_b"], own[f"{name}.lora_B.weight"].numpy())


def test_rslora_keeps_its_scaling(trained, tmp_path):
    folder, _ = trained
    adapted = get_peft_model(
        load_model(folder, torch.float32), LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["o_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    factors, alpha = lora_factors(tmp_path / "adapter")
    assert {f.scaling for f in factors.values()} == {4.0}
    write_lora_gguf(tmp_path / "l.gguf", adapted.base_model.config, factors, alpha)
    assert fields(tmp_path / "l.gguf")["adapter.lora.alpha"] == 8


def test_quantized_base_is_merged_as_it_was_trained(trained, tmp_path):
    folder, adapter = trained
    options = ["--model", folder, "--adapter", adapter]
    export(*options, "--gguf", tmp_path / "m.gguf", "--outtype", "bf16")
    export(*options, "--merged", tmp_path / "merged")
    merged = load_model(tmp_path / "merged").state_dict()
    again = read_by_transformers(tmp_path / "m.gguf").to(torch.bfloat16).state_dict()
    assert [name for name in merged if not torch.equal(again[name], merged[name])] == []


def test_ollama_folder(trained, tmp_path):
    folder, adapter = trained
    export("--model", folder, "--adapter", adapter, "--ollama", tmp_path / "ollama", "--outtype", "q8_0")
    lines = (tmp_path / "ollama" / "Modelfile").read_text().splitlines()
    assert lines == ["FROM ./model.gguf", "PARAMETER num_ctx 256", 'PARAMETER stop "<eos>"']
    values = fields(tmp_path / "ollama" / "model.gguf")
    assert values["tokenizer.chat_template"] == load_tokenizer(folder).chat_template


def test_vllm_folder(trained, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _ = trained
    adapted = get_peft_model(load_model(folder, torch.float32), LoraConfig(r=4, target_modules=r".*layers\.1.*proj"))
    adapted.save_pretrained(tmp_path / "adapter")
    export("--model", folder, "--adapter", tmp_path / "adapter", "--vllm", tmp_path / "vllm")
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config["base_model_name_or_path"] == str(folder.resolve())
    assert {p.name for p in (tmp_path / "vllm").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = transformers.AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
        served = peft.PeftModel.from_pretrained(base, tmp_path / "vllm").eval()(IDS).logits
        torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "named"), [("builtin", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("owner/model", "owner/model")]
)
def test_vllm_base_by_id(trained, tmp_path, base, named):
    from qlora_kernels.integrations.adapter_export import write_vllm_adapter

    adapted = get_peft_model(load_model(trained[0]), LoraConfig(r=2, target_modules=["o_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    write_vllm_adapter(tmp_path / "adapter", base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == named


def test_refused(trained, tmp_path, capsys):
    folder, adapter = trained
    head = tmp_path / "head"
    get_peft_model(load_model(folder), LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(head)
    cases = [
        (["--lora-gguf", tmp_path / "l.gguf"], "--lora-gguf: needs --adapter"),
        (["--adapter", head, "--lora-gguf", tmp_path / "h.gguf"], "adapter of lm_head must be over a model whose head"),
        (["--adapter", adapter, "--vllm", tmp_path / "v"], "vLLM takes one r and one lora_alpha"),
        (["--merged", folder], "--merged: must not exist"),
        (["--adapter", adapter, "--vllm", tmp_path / "v", "--base", "no/such/model"], "use --merged"),
    ]
    config = adapter / "adapter_config.json"
    for field, value in (
        ("use_dora", True),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
    ):
        other = tmp_path / field
        other.mkdir()
        (other / config.name).write_text(json.dumps({**json.loads(config.read_text()), field: value}))
        save_file(load_file(adapter / "adapter_model.safetensors"), other / "adapter_model.safetensors")
        cases.append((["--adapter", other, "--lora-gguf", tmp_path / "x.gguf"], f"{field} must "))
    for options, words in cases:
        export("--model", folder, *options, code=2)
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "v").exists()
