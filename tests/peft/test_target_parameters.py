"""LoRA of expert weights and other parameters: PEFT's names, shapes, outputs, gradients and files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.peft.models import randomize
from tests.support.tolerances import assert_same_function, assert_same_gradients

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
IDS = torch.arange(1, 15).view(2, 7)

TERMS = 96
"""Length of the longest sums of these models, their intermediate size."""


def mixtral(implementation="eager"):
    """Weights [experts, out, in], with one matmul per expert."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = implementation
    return MixtralForCausalLM(config).eval()


def gpt_oss():
    """Weights [experts, in, out] (is_transposed), with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)).eval()


MODELS = {
    "mixtral": mixtral,
    "grouped": lambda: mixtral("grouped_mm"),
    "batched": lambda: mixtral("batched_mm"),
    "gpt_oss": gpt_oss,
}
TARGETS = {
    "experts": {"target_modules": [], "target_parameters": list(EXPERTS)},
    "one": {"target_parameters": [EXPERTS[1]]},
    "with layers": {"target_modules": ["q_proj"], "target_parameters": list(EXPERTS), "rank_pattern": {EXPERTS[0]: 3}},
}


def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def adapted(base, **options):
    model = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 6, **TARGETS["experts"], **options}))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_outputs_gradients_and_files_equal_peft(hf_peft, tmp_path, make, targets):
    options = {"r": 2, "lora_alpha": 6, **copy.deepcopy(TARGETS[targets])}
    theirs = hf_peft.get_peft_model(make(), hf_peft.LoraConfig(**options)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs)
    expected.square().sum().backward()
    ours = PeftModel.from_pretrained(make(), tmp_path / "theirs", is_trainable=True).eval()
    y = logits(ours)
    assert_same_function(y, expected, terms=TERMS)
    y.square().sum().backward()
    wanted = {n.replace(".default", "").removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters()}
    own = dict(ours.adapters["default"][0].named_parameters())
    assert own.keys() == {name for name in wanted if "lora_" in name}
    assert_same_gradients({name: p.grad for name, p in own.items()}, {name: wanted[name] for name in own}, terms=TERMS)
    ours.save_pretrained(tmp_path / "ours")
    again = hf_peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert_same_function(logits(again), expected, terms=TERMS)
    with ours.disable_adapter():
        assert_same_function(logits(ours), logits(make()), terms=TERMS)
    assert_same_function(logits(ours.merge_and_unload()), expected, terms=TERMS)


def test_a_router_and_a_plain_weight(hf_peft, tmp_path):
    """A two-dimensional parameter is treated as one expert."""
    options = {"r": 2, "target_modules": ["v_proj"], "target_parameters": ["gate.weight", "k_proj.weight"]}
    theirs = hf_peft.get_peft_model(mixtral(), hf_peft.LoraConfig(**options)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(mixtral(), tmp_path)
    assert_same_function(logits(ours), logits(theirs), terms=TERMS)
    merged = ours.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.k_proj) is nn.Linear
    assert_same_function(logits(merged), logits(theirs), terms=TERMS)


class TestOverQuantizedExperts:
    @staticmethod
    def quantized():
        model = mixtral()
        qk.replace_experts(model)
        return model

    @staticmethod
    def dequantized():
        model = mixtral()
        for layer, nf4 in zip(model.model.layers, TestOverQuantizedExperts.quantized().model.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                setattr(layer.mlp.experts, name, nn.Parameter(getattr(nf4.mlp.experts, name).dequantize()))
        return model

    def test_nf4_equals_dequantized_weights(self, tmp_path):
        model = adapted(self.quantized())
        expected = logits(model)
        expected.square().sum().backward()
        model.save_pretrained(tmp_path)
        dense = PeftModel.from_pretrained(self.dequantized(), tmp_path, is_trainable=True).eval()
        y = logits(dense)
        y.square().sum().backward()
        assert_same_function(y, expected, terms=TERMS)
        grads = [{name: p.grad for name, p in m.adapters.named_parameters()} for m in (model, dense)]
        assert_same_gradients(*grads, terms=TERMS)
        again = PeftModel.from_pretrained(self.quantized(), tmp_path)
        assert_same_function(logits(again), expected, terms=TERMS)

    @pytest.mark.parametrize(
        ("target", "kind"), [("16bit", nn.Parameter), ("nf4", qk.ExpertsNF4), ("same", qk.ExpertsNF4)]
    )
    @pytest.mark.filterwarnings("ignore:merge. quantizing again")
    def test_merging(self, target, kind):
        model = adapted(self.quantized())
        expected, base = logits(model), model.base_model
        model.merge_adapter(target=target)
        merged = logits(model)
        if target == "16bit":
            assert_same_function(merged, expected, terms=TERMS)
        else:  # quantized again, with errors of up to a seventh of a block's largest weight
            assert (merged - expected).abs().max() < 0.2
        with pytest.raises(ValueError, match="must not be merged"):
            model.delete_adapter("default")
        with model.disable_adapter():
            assert_same_function(logits(model), logits(self.quantized()), terms=TERMS)
        model.unmerge_adapter()
        assert_same_function(logits(model), expected, terms=TERMS)
        assert model.merge_and_unload(target=target) is base
        assert type(base.model.layers[0].mlp.experts.down_proj) is kind
        assert_same_function(logits(base), merged, terms=TERMS)

    def test_unload_leaves_the_model_as_it_was(self):
        model, before = self.quantized(), self.quantized()
        back = adapted(model).unload()
        assert [(n, type(m)) for n, m in back.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
        assert back.state_dict().keys() == before.state_dict().keys()
        assert_same_function(logits(back), logits(before), terms=TERMS)


def test_several_adapters_add_up_and_can_be_removed():
    model = adapted(mixtral())
    model.add_adapter("b", LoraConfig(r=3, target_parameters=EXPERTS[0], target_modules=["v_proj"]))
    model.set_adapter("b")
    randomize(model, seed=5)
    alone = {name: logits(model) for name in ("default", "b") if model.set_adapter(name) is None}
    model.set_adapter(["default", "b"])
    both = logits(model)
    assert not any(torch.allclose(both, y, atol=1e-3) for y in alone.values())
    assert_same_function(logits(copy.deepcopy(model).merge_and_unload()), both, terms=TERMS)
    model.delete_adapter("default")
    assert_same_function(logits(model), alone["b"], terms=TERMS)
    with pytest.raises(ValueError, match=r"it updates parameters for the whole batch, .*gate_up_proj"):
        model(input_ids=IDS, adapter_names=["b", "__base__"])
    with pytest.raises(NotImplementedError, match="adapter 'b' must not have target_parameters"):
        model.add_weighted_adapter(["b"], [1.0], "c")


def test_a_new_adapter_is_the_identity_and_trains():
    for init in (True, "gaussian"):
        model = get_peft_model(mixtral(), LoraConfig(**TARGETS["experts"], init_lora_weights=init)).train()
        assert_same_function(logits(model), logits(mixtral()), terms=TERMS)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        first = None
        for _ in range(5):
            loss = model(input_ids=IDS, labels=IDS).loss
            first = loss.item() if first is None else first
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() < first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["mlp.experts.gate_up"]}, "target_parameters: every name .* got 'mlp.experts.gate_up'"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "must not belong to a layer that"),
        ({"target_parameters": ["norm.weight"]}, "must have two or three dimensions"),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0.0 with target_parameters"),
        ({"use_dora": True}, "use_dora must be False with target_parameters"),
        ({"lora_bias": True}, "lora_bias must be False with target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be .* with target_parameters"),
        ({"rank_pattern": {"mlp.experts.up": 3}}, "rank_pattern: every key must match"),
    ],
)
def test_unsupported_options_are_refused(options, message):
    model = mixtral()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**{**TARGETS["experts"], **options}))
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_files_of_another_rank_are_refused(tmp_path):
    adapted(mixtral()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 10**9}))
    with (
        pytest.warns(UserWarning, match="differs from the file that was saved"),
        pytest.raises(ValueError, match="must have 4000000000 rows"),
    ):
        PeftModel.from_pretrained(mixtral(), tmp_path)


def test_all_linear_with_target_parameters_does_not_warn(recwarn):
    get_peft_model(mixtral(), LoraConfig(target_modules="all-linear", target_parameters=EXPERTS))
    assert not [warning for warning in recwarn if "leaves out" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"leaves out 2 expert weights .*target_parameters adapts them"):
        get_peft_model(mixtral(), LoraConfig(target_modules="all-linear", target_parameters=EXPERTS[0]))
