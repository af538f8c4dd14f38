"""from_bnb and to_bnb: conversion of models between bitsandbytes' layers and this package's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from tests.support.tolerances import assert_same_function

bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

from qlora_kernels.integrations.transformers import load_model  # noqa: E402

from .tiny_models import assert_same_model, build, logits, of_type  # noqa: E402

AUTO = transformers.AutoModelForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    build("llama").save_pretrained(path)
    return path


def theirs(folder, **options):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(**{**settings, **options})
    return AUTO.from_pretrained(folder, quantization_config=config).train()


@pytest.mark.parametrize("double_quant", [True, False])
def test_round_trip_through_bitsandbytes(double_quant, folder, tmp_path):
    model = theirs(folder, bnb_4bit_use_double_quant=double_quant)
    expected = logits(model)
    first = model.model.layers[0].self_attn.q_proj.weight
    values = bnb.functional.dequantize_4bit(first.data, first.quant_state)
    assert qk.from_bnb(model) is model
    assert not of_type(model, bnb.nn.Linear4bit)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.dequantize(), values)
    assert_same_function(logits(model), expected, terms=64)
    model.save_pretrained(tmp_path / "ours")
    assert_same_model(load_model(tmp_path / "ours", torch.float32), model.eval())
    assert qk.to_bnb(model) is model
    assert len(of_type(model, bnb.nn.Linear4bit)) == 14
    assert_same_function(logits(model.train()), expected, terms=64)
    model.save_pretrained(tmp_path / "theirs")
    assert_same_function(logits(AUTO.from_pretrained(tmp_path / "theirs").train()), expected, terms=64)


def test_layers_after_forward_in_eval_mode(folder):
    """On some CPUs bitsandbytes then repacks the weight and rounds its scales to bfloat16."""
    model = theirs(folder)
    before = qk.from_bnb(theirs(folder)).model.layers[0].mlp.up_proj.dequantize()
    logits(model.eval())
    after = qk.from_bnb(model).model.layers[0].mlp.up_proj.dequantize()
    torch.testing.assert_close(after, before, rtol=2**-8, atol=0)


def test_plain_modules_and_shared_weights():
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    other = bnb.nn.Linear4bit(64, 64, quant_type="nf4", bias=False)
    other.weight = layer.weight
    model = qk.from_bnb(nn.ModuleList([layer, other, layer]))
    assert model[0] is model[2]
    assert model[0].packed is model[1].packed
    back = qk.to_bnb(model)
    assert back[0] is back[2]
    assert back[0].weight is back[1].weight


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ModuleList([bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu")]), "0 must be in NF4, got 'fp4'"),
        (nn.ModuleList([bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)]), "0 must be a Linear4bit, got 8-bit"),
        (nn.ModuleList([bnb.nn.Linear4bit(64, 64, quant_type="nf4")]), "0 must be quantized"),
        (nn.ModuleList([nn.Linear(64, 64)]), "must contain bitsandbytes.nn.Linear4bit layers"),
    ],
    ids=["fp4", "int8", "not quantized", "no layer"],
)
def test_unsupported_layers_are_refused(model, message):
    before = type(model[0])
    with pytest.raises(ValueError, match=message):
        qk.from_bnb(model)
    assert type(model[0]) is before


def test_other_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str; a folder loads with"):
        qk.from_bnb("folder")
    with pytest.raises(ValueError, match="must contain LinearNF4 layers"):
        qk.to_bnb(nn.Linear(4, 4))
