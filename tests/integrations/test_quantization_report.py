"""The quantization report: errors computed directly, shares of codes against sampled weights, the command."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from qlora_kernels import QuantState, dequantize_nf4, quantize_nf4
from qlora_kernels.cli import main
from qlora_kernels.format import nf4
from qlora_kernels.integrations.model_folders import load_model
from qlora_kernels.integrations.quantization_report import layer_error, normal_shares, quantization_report
from tests.support.tiny_model import LINEARS, write_tiny_llama
from tests.support.tiny_tokenizers import tiny_tokenizer


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_shares_of_codes_are_those_of_sampled_normal_weights(blocksize):
    n = 1 << 19
    weight = torch.randn(n, generator=torch.Generator().manual_seed(blocksize)).view(128, -1)
    shares = normal_shares(blocksize)
    assert sum(shares) == pytest.approx(1, abs=1e-9)
    layer = layer_error("w", weight, blocksize, double_quant=False)
    # Weights of a block share its largest value, so that their codes are correlated: hence 12 and not 5 deviations.
    for code, (got, expected) in enumerate(zip(layer.shares, shares, strict=True)):
        assert abs(got - expected) <= 12 * math.sqrt(expected * blocksize / 64 / n) + 1e-6, code
    assert layer.divergence < 2e-3


def test_error_of_a_layer():
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = layer_error("w", weight, 64, double_quant=True)
    packed, state = quantize_nf4(weight.float(), 64, True)
    error = (dequantize_nf4(packed, state) - weight.float()).double()
    assert layer.relative == pytest.approx(float(error.square().sum().sqrt() / weight.double().square().sum().sqrt()))
    assert layer.largest == float(error.abs().max())
    assert layer.bits == state.bits_per_param
    codes = nf4.unpack(packed, weight.numel()).tolist()
    assert layer.shares == tuple(codes.count(i) / len(codes) for i in range(16))


def test_weights_without_normal_distribution_have_large_divergence():
    generator = torch.Generator().manual_seed(0)
    normal = layer_error("n", torch.randn(256, 64, generator=generator), 64, double_quant=True)
    uniform = layer_error("u", torch.rand(256, 64, generator=generator) * 2 - 1, 64, double_quant=True)
    zero = layer_error("z", torch.zeros(4, 64), 64, double_quant=True)
    assert normal.divergence < 0.01 < 0.1 < uniform.divergence
    assert (zero.relative, zero.largest, zero.shares[nf4.ZERO_INDEX]) == (0.0, 0.0, 1.0)


def test_reported_layers_equal_quantized_layers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    sizes = {"vocab_size": len(tiny_tokenizer("gpt2")), "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.save_pretrained(folder)
    report = quantization_report(folder)
    by_name = {layer.name: layer for layer in report.layers}
    assert len(by_name) == 4
    assert by_name["transformer.h.0.mlp.c_fc"].shape == (128, 32), "Conv1D is quantized transposed"
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().T.contiguous()
    assert by_name["transformer.h.0.mlp.c_fc"].relative == layer_error("x", weight, 64, True).relative


def test_command(tmp_path, capsys):
    folder = write_tiny_llama(tmp_path / "model")
    files = ["--out", str(tmp_path / "q.json"), "--plot", str(tmp_path / "q.png")]
    assert main(["quality", "--model", str(folder), "--json", *files]) == 0
    values = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "q.json").read_text()) == values
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    assert len(values["layers"]) == LINEARS
    assert main(["quantize", str(folder), str(tmp_path / "nf4")]) == 0
    dense, quantized = (load_model(path, torch.float32) for path in (folder, tmp_path / "nf4"))
    for layer in values["layers"]:
        weight = dense.get_submodule(layer["name"]).weight
        module = quantized.get_submodule(layer["name"])
        state = QuantState(weight.shape, torch.float32, 64, *module.quant_state.constants)  # no rounding to bf16
        error = (dequantize_nf4(module.packed, state) - weight.detach()).double()
        assert layer["relative"] == pytest.approx(float(error.norm() / weight.detach().double().norm()))
    capsys.readouterr()
    assert main(["quality", "--model", str(folder), "--rows", "2", "--skip", "lm_head,down_proj"]) == 0
    text = capsys.readouterr().out
    assert f"{LINEARS - 2} layers, blocks of 64: relative error 0.0" in text
    assert text.count("model.layers.") == 2


def test_refused(tmp_path, capsys, monkeypatch):
    folder = write_tiny_llama(tmp_path / "model")
    assert main(["quantize", str(folder), str(tmp_path / "nf4")]) == 0
    assert main(["quality", "--model", str(tmp_path / "nf4")]) == 2
    assert "--model: must be dense" in capsys.readouterr().err
    assert main(["quality", "--model", str(folder), "--skip", "q_prj"]) == 2
    assert "matches no linear layer" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["quality", "--model", str(folder), "--plot", str(tmp_path / "q.png")]) == 2
    assert "pip install 'qlora_kernels[plot]'" in capsys.readouterr().err
