"""`qlora-kernels export`: a trained adapter as a merged or a LoRA GGUF file, for Ollama and for vLLM."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_kernels.cli import main
from qlora_kernels.integrations.adapter_export import lora_factors
from qlora_kernels.integrations.gguf_export import write_lora_gguf
from qlora_kernels.integrations.model_folders import load_model, load_tokenizer
from qlora_kernels.peft import LoraConfig, get_peft_model
from tests.support.tiny_model import LINEARS, write_tiny_llama

from .gguf_files import IDS, fields, read_by_transformers, tensors


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
