"""Hugging Face PEFT's LoRA over LinearNF4."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from tests.support.tolerances import assert_same_function, assert_same_gradients

peft = pytest.importorskip("peft")

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402

from qlora_kernels.integrations.peft import LoraLinearNF4, LoraModelNF4, register  # noqa: E402

from .tiny_models import IDS, assert_same_model, build, logits, of_type  # noqa: E402

register()


def quantized(kind="llama"):
    model = build(kind)
    qk.replace_linear(model)
    return model


def dense(kind="llama"):
    """Return a dense model with the values of the quantized one."""
    return quantized(kind).dequantize()


def adapted(model, *, seed=1, targets="all-linear", **options):
    torch.manual_seed(seed)
    options.setdefault("init_lora_weights", False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


def loss_gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_registration_is_idempotent_and_leaves_other_layers_alone():
    register()
    assert PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is LoraModelNF4
    kinds = {type(m).__name__ for m in adapted(dense()).modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert kinds == {"Linear"}


def test_package_alone_imports_no_peft():
    code = "import sys, qlora_kernels, qlora_kernels.cli; assert not {'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_same_outputs_gradients_and_keys_as_over_dense_layers(kind, options):
    if options.get("lora_bias") and kind == "llama":
        pytest.skip("its layers have no bias")
    ours = adapted(quantized(kind), fan_in_fan_out=kind == "gpt2", **options)
    theirs = adapted(dense(kind), fan_in_fan_out=kind == "gpt2", **options)
    assert len(of_type(ours, LoraLinearNF4)) == (14 if kind == "llama" else 8)
    state = peft.get_peft_model_state_dict(theirs)
    assert peft.get_peft_model_state_dict(ours).keys() == state.keys()
    peft.set_peft_model_state_dict(ours, state)
    assert_same_function(logits(ours.eval()), logits(theirs.eval()))
    assert_same_gradients(loss_gradients(ours.train()), loss_gradients(theirs.train()))


def test_fused_op_runs(monkeypatch):
    model = adapted(quantized())
    calls = []
    original = qk.LinearNF4.forward_lora
    monkeypatch.setattr(qk.LinearNF4, "forward_lora", lambda self, *a: calls.append(1) or original(self, *a))
    monkeypatch.setattr(qk.LinearNF4, "forward", lambda *a: pytest.fail("ran without the adapter"))
    logits(model)
    assert len(calls) == 14
    handle = model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].register_forward_hook(print)
    with pytest.raises(pytest.fail.Exception):
        logits(model)  # a watched layer is called
    handle.remove()


def test_dropout_acts_in_training_only():
    model = adapted(quantized(), lora_dropout=0.5)
    assert torch.equal(logits(model.eval()), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


def test_several_active_adapters_add_up():
    ours, theirs = adapted(quantized()), adapted(dense())
    for model in (ours, theirs):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    peft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    peft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs, adapter_name="other"), "other")
    assert_same_function(logits(ours.eval()), logits(theirs.eval()))


def test_mixed_batch(monkeypatch):
    model = adapted(quantized()).eval()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = []
    for name in ("default", "other", None):
        with model.disable_adapter() if name is None else nullcontext():
            model.set_adapter(name or "default")
            expected.append(logits(model)[0])
    calls = []
    original = qk.LinearNF4.forward_multi_lora
    monkeypatch.setattr(qk.LinearNF4, "forward_multi_lora", lambda self, *a: calls.append(1) or original(self, *a))
    with torch.no_grad():
        mixed = model(input_ids=IDS[:1].expand(3, -1), adapter_names=["default", "other", "__base__"]).logits
    assert len(calls) == 14
    assert_same_function(mixed, torch.stack(expected))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_merge_and_unmerge(options):
    model = adapted(quantized(), **options).eval()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    packed = layer.base_layer.packed.clone()
    expected, base = logits(model), logits(quantized())
    model.merge_adapter(safe_merge=True)
    assert type(layer.base_layer) is nn.Linear
    assert_same_function(logits(model), expected)
    with model.disable_adapter():
        assert_same_function(logits(model), base)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.packed, packed)
    assert_same_function(logits(model), expected)
    merged = model.merge_and_unload()
    assert not of_type(merged, qk.LinearNF4, LoraLinearNF4)
    assert not hasattr(merged.config, "quantization_config")
    assert_same_function(logits(merged), expected)


def test_two_adapters_merge_one_after_the_other():
    model = adapted(quantized()).eval()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert_same_function(logits(model), expected)
    model.unmerge_adapter()
    assert_same_function(logits(model), expected)


def test_merge_refuses_nonfinite_weights():
    model = adapted(quantized(), targets=["q_proj"])
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="finite merged weights"):
        model.merge_adapter(safe_merge=True)


def test_files_load_in_peft_over_dense_layers_and_here(tmp_path):
    model = adapted(quantized()).eval()
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert_same_model(peft.PeftModel.from_pretrained(quantized(), tmp_path).eval(), model)
    assert_same_function(logits(peft.PeftModel.from_pretrained(dense(), tmp_path)), expected)
    assert_same_function(logits(qk.peft.PeftModel.from_pretrained(quantized(), tmp_path)), expected)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_initializations_that_change_the_base_are_refused(init):
    with pytest.raises(NotImplementedError, match="must not change the base weight"):
        adapted(quantized(), targets=["q_proj"], init_lora_weights=init)


def test_quantized_modules_are_not_saved():
    """PEFT would copy the NF4 layer, of which nothing but the bias trains."""
    model = quantized()
    with pytest.raises(
        ValueError, match=r"modules_to_save: model\.layers\.0\.mlp\.up_proj must not be quantized; name it"
    ):
        adapted(model, targets=["q_proj"], modules_to_save=["up_proj"])


def test_packed_attention_of_torch(tmp_path):
    """SigLIP's head holds nn.MultiheadAttention, whose out_proj is never called; PEFT's file has no update of it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    base = transformers.SiglipVisionModel(config).eval()
    qk.replace_linear(base)
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8)}
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted_layers = of_type(theirs, LoraLinearNF4)
    assert len(adapted_layers) == 8
    assert not any("head.attention" in name for name in adapted_layers)
    theirs.save_pretrained(tmp_path)
    ours = qk.peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert_same_function(ours(**inputs).pooler_output, theirs.eval()(**inputs).pooler_output)
