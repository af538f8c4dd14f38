"""target_modules and its companions: the same layers as PEFT, and errors that help."""

from __future__ import annotations

import pytest
from torch import nn

from qlora_kernels.peft import LoraConfig, get_peft_model
from tests.peft.models import make

RULES = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "up_proj"]}),
    ("llama", {"target_modules": ["layers.1.self_attn.q_proj"]}),
    ("llama", {"target_modules": r".*\.layers\.\d+\.mlp\.(up|down)_proj"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-LINEAR", "exclude_modules": ["k_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("bert", {}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["dense"], "modules_to_save": ["classifier", "pooler"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("t5", {}),
    ("t5", {"target_modules": "all-linear"}),
]


@pytest.mark.parametrize(
    ("kind", "rule"), RULES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_same_layers_as_peft(hf_peft, kind, rule):
    ours = get_peft_model(make(kind), LoraConfig(**rule))
    theirs = hf_peft.get_peft_model(make(kind), hf_peft.LoraConfig(**rule))
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(ours.host.adapted()) == adapted


def test_rank_and_alpha_patterns(hf_peft):
    rule = {
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 5},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 32, "v_proj": 2},
        "use_rslora": True,
    }
    ours = get_peft_model(make("llama"), LoraConfig(**rule))
    theirs = hf_peft.get_peft_model(make("llama"), hf_peft.LoraConfig(**rule)).base_model.model
    for path, layer in ours.host.adapted().items():
        delta, module = layer.deltas["default"], theirs.get_submodule(path)
        assert (delta.r, delta.scaling) == (module.r["default"], module.scaling["default"])


def test_no_match_names_the_nearest():
    with pytest.raises(ValueError, match=r"nearest names: .*'q_proj'"):
        get_peft_model(make("llama"), LoraConfig(target_modules=["q_projj"]))


def test_a_block_is_no_target():
    with pytest.raises(TypeError, match=r"self_attn must be a linear layer or nn.Embedding, got LlamaAttention"):
        get_peft_model(make("llama"), LoraConfig(target_modules=["self_attn"]))


def test_unknown_architecture_needs_targets():
    with pytest.raises(ValueError, match="target_modules: must be given"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig())


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layer_fields_do_not_go_with_a_regex(field):
    with pytest.raises(ValueError, match=field):
        get_peft_model(make("llama"), LoraConfig(target_modules=r".*q_proj", **{field: [0]}))
