"""info, quantize, merge, generate, bench."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qlora_kernels.cli import main
from qlora_kernels.cli.generate import continuation
from qlora_kernels.cli.methods import METHODS
from qlora_kernels.integrations.transformers import load_model
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.support.tiny_model import LINEARS, write_tiny_llama
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.tolerances import assert_same_function, model_error

IDS = torch.arange(20).view(1, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def nf4(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4") / "model"
    assert main(["quantize", str(model), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def adapter(nf4, tmp_path_factory):
    """Random, far from identity, on the attention's layers only."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapted = get_peft_model(load_model(nf4), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    return folder


def output(capsys, *argv) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out


def test_info_reports_versions_backends_and_instruction_set(capsys):
    facts = json.loads(output(capsys, "info", "--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"].keys() == {"reference", "cpu", "triton", "cuda"}
    assert facts["backends"]["reference"].startswith("available")
    assert {"QLORA_BACKEND", "QLORA_CPU_ISA"} <= facts["environment"].keys()
    assert facts["cpu"]["kernels use"] in (
        "amx_bf16",
        "avx512_bf16_fma",
        "avx512_bf16",
        "avx512",
        "avx2",
        "neon",
        "portable",
    )
    assert facts["cpu"]["because"]
    assert facts["cpu"]["amx"]
    text = output(capsys, "info")
    assert "backends" in text
    assert "instruction sets" in text


def test_info_plan_lists_kernel_and_reason_per_backend(capsys):
    plans = json.loads(output(capsys, "info", "--plan", "8,4096,4096", "--json"))
    forward = plans["linear_nf4 M=8 N=4096 K=4096"]
    assert forward.keys() == {"reference", "cpu", "triton", "cuda"}
    assert forward["cuda"].startswith("linear_nf4_pairs.cu [block_m=8 block_n=32]: 3 <= M=8 <= 16")
    fp16 = json.loads(output(capsys, "info", "--plan", "8,4096,4096", "--dtype", "fp16", "--json"))
    cuda = fp16["linear_nf4 M=8 N=4096 K=4096"]["cuda"]
    assert cuda.startswith("linear_nf4_gemm.cu [block_m=16 block_n=128 block_k=64]: M=8 <= 128")
    assert "linear_nf4_pairs.cu is left out: x is float16" in cuda
    assert forward["triton"].startswith("linear_nf4_fused [block_m=16")
    large = json.loads(output(capsys, "info", "--plan", "4096x4096x4100", "--dtype", "fp32", "--json"))
    assert large["linear_nf4 M=4096 N=4096 K=4100"]["cuda"].startswith("dequantize_nf4.cu, then torch.matmul: K=4100")
    with pytest.raises(SystemExit):
        main(["info", "--plan", "8,4096"])
    assert "--plan must be three positive integers" in capsys.readouterr().err


def test_quantize(capsys, model, nf4, tmp_path):
    result = json.loads(output(capsys, "quantize", model, tmp_path / "nf4", "--json"))
    assert result["layers"] == LINEARS
    assert 3.7 < result["bytes_before"] / result["bytes_after"] < 3.9
    assert (tmp_path / "nf4" / "model.safetensors").read_bytes() == (nf4 / "model.safetensors").read_bytes()
    assert main(["quantize", str(model), str(tmp_path / "nf4")]) == 2
    assert "DST must not exist" in capsys.readouterr().err
    assert main(["quantize", str(nf4), str(tmp_path / "twice")]) == 2
    assert "in NF4 already" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_generate(capsys, model, nf4, adapter):
    prompt = ("--prompt", "abc", "--max-new-tokens", "6")
    from_dense = json.loads(output(capsys, "generate", "--model", model, *prompt, "--json"))["text"]
    from_nf4 = output(capsys, "generate", "--model", nf4, *prompt).rstrip("\n")
    assert from_nf4 == from_dense
    adapted = output(capsys, "generate", "--model", nf4, "--adapter", adapter, *prompt).rstrip("\n")
    assert adapted != from_nf4
    sampled = [
        output(capsys, "generate", "--model", nf4, *prompt, "--temperature", "1", "--seed", seed) for seed in "112"
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert json.loads(output(capsys, "generate", "--model", nf4, *prompt, "--chat", "--json"))["prompt"] == (
        "<user>abc\n<assistant>"
    )
    assert main(["generate", "--model", str(nf4), "--prompt", "x", "--adapter", "no/such"]) == 2


@pytest.mark.parametrize(("family", "ids"), [("llama3", [0]), ("gpt2", [])])
def test_generation_begins_with_one_beginning_of_text(family, ids):
    tokenizer = tiny_tokenizer(family)
    seen = []

    class Model(torch.nn.Module):
        def generate(self, input_ids, **options):
            seen.append(input_ids)
            return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    text = "the answer is yes"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert continuation(Model(), tokenizer, text, 1) == " yes"
    assert seen.pop().tolist() == [ids + plain]
    if ids:
        continuation(Model(), tokenizer, "<s>" + text, 1)
        assert seen.pop().tolist() == [ids + plain]


def test_generate_without_a_chat_template(capsys, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert main(["generate", "--model", str(folder), "--dense", "--prompt", "x", "--chat"]) == 2
    assert "the tokenizer must have a chat template" in capsys.readouterr().err


def test_merged_folder_computes_what_the_adapter_does(capsys, model, nf4, adapter, tmp_path):
    output(capsys, "merge", "--model", model, "--adapter", adapter, "--out", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    adapted = PeftModel.from_pretrained(load_model(nf4, torch.float32), adapter)
    with torch.no_grad():
        expected, got = adapted(IDS).logits, merged(IDS).logits
        base = load_model(model, torch.float32)(IDS).logits
    assert_same_function(got, expected, arithmetic=torch.bfloat16)  # each merged weight is rounded to bf16
    assert (expected - base).abs().max() > 2 * model_error(dtype=torch.bfloat16) * expected.abs().max()
    output(capsys, "merge", "--model", model, "--adapter", adapter, "--out", tmp_path / "dense", "--dense")
    dense = load_model(tmp_path / "dense", torch.float32)
    layer = "model.layers.0.mlp.up_proj"  # not adapted
    assert torch.equal(dense.get_submodule(layer).weight, load_model(model, torch.float32).get_submodule(layer).weight)
    assert main(["merge", "--model", str(model), "--adapter", str(adapter), "--out", str(tmp_path / "dense")]) == 2


@pytest.mark.parametrize("command", ["info", "quantize", "finetune", "merge", "generate"])
def test_help_shows_defaults(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    if command == "finetune":
        assert "peak learning rate (default: 0.001)" in text
        assert all(method in text for method in METHODS)


def test_merge_of_gpt2_writes_conv1d_layers(tmp_path):
    """Adapted layers and those without an adapter are stored transposed, as transformers reads them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer("gpt2")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32}
    for part in (GPT2LMHeadModel(GPT2Config(**sizes)).bfloat16(), tokenizer):
        part.save_pretrained(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "nf4")]) == 0
    adapted = get_peft_model(load_model(tmp_path / "nf4"), LoraConfig(r=4, target_modules=["c_attn"]))
    torch.nn.init.normal_(
        adapted.injector.adapted_layers()["transformer.h.0.attn.c_attn"].deltas["default"].lora_B.weight
    )
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = ["--model", tmp_path / "nf4", "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged"]
    assert main(["merge", *map(str, arguments)]) == 0
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert_same_function(merged(IDS).logits, adapted.eval()(IDS).logits, terms=256)
