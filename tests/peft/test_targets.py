"""target_modules and related fields: the same layers as PEFT, and helpful errors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.nn.match import is_skipped, matches, matches_ending
from qlora_kernels.peft import (
    AdaLoraConfig,
    BitFitConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    UniPELTConfig,
    get_peft_model,
)
from qlora_kernels.peft.layers.base_layer import is_linear
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
    assert set(ours.injector.adapted_layers()) == adapted


def test_rank_and_alpha_patterns(hf_peft):
    rule = {
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 5},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 32, "v_proj": 2},
        "use_rslora": True,
    }
    ours = get_peft_model(make("llama"), LoraConfig(**rule))
    theirs = hf_peft.get_peft_model(make("llama"), hf_peft.LoraConfig(**rule)).base_model.model
    for path, layer in ours.injector.adapted_layers().items():
        delta, module = layer.deltas["default"], theirs.get_submodule(path)
        assert (delta.r, delta.scaling) == (module.r["default"], module.scaling["default"])


PATTERNS = {
    "llama": [
        ["q_proj"],
        ["layers.1.self_attn.q_proj"],
        ["proj"],
        ["model.layers.0.mlp"],
        r".*\.(up|down)_proj",
        "q_proj",
    ],
    "bert": [
        ["query", "value"],
        ["dense"],
        ["output.dense"],
        r"bert\.encoder\.layer\.\d\.output\.dense",
        ["classifier"],
    ],
    "gpt2": [["c_attn"], ["c_proj"], ["mlp.c_proj"], r"transformer\.h\.[01]\.mlp\..*", ["attn"]],
    "t5": [["q", "v"], ["SelfAttention.q"], ["wo"], r".*EncDecAttention\.k", ["decoder.block.0.layer.0"]],
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_one_rule_for_all_lists_of_names(hf_peft, kind):
    """target_modules, replace_linear's targets and skip, and rank_pattern match as PEFT's functions do."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    modules = dict(make(kind).named_modules())
    for pattern in PATTERNS[kind]:
        config = hf_peft.LoraConfig(target_modules=pattern)
        theirs = {name for name in modules if name and check_target_module_exists(config, name)}
        assert {name for name in modules if name and matches(pattern, name)} == theirs
        # A name inside a matching block is skipped too.
        inside = {name for name in modules if any(f"{name}.".startswith(f"{block}.") for block in theirs)}
        assert {name for name in modules if name and is_skipped(pattern, name)} == inside
        linears = {name for name, module in modules.items() if is_linear(module)}
        if theirs & linears:
            report = qk.replace_linear(make(kind), targets=pattern, skip=())
            assert set(report.replaced) == theirs & linears
        if inside & linears and linears - inside:
            kept = qk.replace_linear(make(kind), skip=pattern).skipped
            assert inside & linears <= set(kept)
    for key in ("1.*", "q", "self_attn.*", r"^transformer\.h\.0.*", "dense"):
        assert {name for name in modules if matches_ending(key, name)} == {
            name for name in modules if get_pattern_key([key], name) != name or key == name
        }


def test_no_match_error_names_nearest():
    with pytest.raises(ValueError, match=r"nearest names: .*'q_proj'"):
        get_peft_model(make("llama"), LoraConfig(target_modules=["q_projj"]))


def test_block_as_target_is_refused():
    with pytest.raises(
        TypeError, match=r"self_attn must be a linear layer, an nn\.Embedding or a convolution, got LlamaAttention"
    ):
        get_peft_model(make("llama"), LoraConfig(target_modules=["self_attn"]))


def test_unknown_architecture_needs_targets():
    with pytest.raises(ValueError, match="target_modules: must be given"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig())


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layer_fields_with_regex_are_refused(field):
    with pytest.raises(ValueError, match=field):
        get_peft_model(make("llama"), LoraConfig(target_modules=r".*q_proj", **{field: [0]}))


NAMES_OF_NOTHING = [
    ("llama", LoraConfig(target_modules=["q_proj", "v_porj"]), r"target_modules: \['v_porj'\].*'v_proj'"),
    ("llama", LoraConfig(target_modules="q_proj"), r"target_modules: 'q_proj' .*regular expression.*'q_proj'"),
    ("llama", LoraConfig(exclude_modules=["v_porj"]), r"exclude_modules: .*'v_porj'.*'v_proj'"),
    ("llama", LoraConfig(target_modules="all-linear", exclude_modules=["mlp"]), "exclude_modules: .*'mlp'"),
    ("llama", LoraConfig(exclude_modules=r".*\.v_porj"), "exclude_modules: .*regular expression"),
    ("llama", LoraConfig(layers_to_transform=[0, 2]), r"layers_to_transform: .* got \[2\]; there are \[0, 1\]"),
    ("llama", LoraConfig(layers_to_transform=0, layers_pattern="layrs"), "layers_pattern: 'layrs'.*'layers'"),
    ("llama", LoraConfig(rank_pattern={"up_proj": 2}), r"rank_pattern: .*\['up_proj'\]"),
    ("llama", LoraConfig(alpha_pattern={"v_porj": 2}), r"alpha_pattern: .*\['v_porj'\].*'v_proj'"),
    ("llama", LoraConfig(modules_to_save=["lm_haed"]), "modules_to_save: .*'lm_haed'.*'lm_head'"),
    ("llama", AdaLoraConfig(total_step=9, target_modules=["q_porj"]), "target_modules: .*'q_proj'"),
    ("llama", UniPELTConfig(target_modules=["q_porj"]), "target_modules: .*'q_proj'"),
    ("llama", PromptTuningConfig(modules_to_save="lm_haed"), "modules_to_save: .*'lm_head'"),
    ("llama", PrefixTuningConfig(modules_to_save="lm_haed"), "modules_to_save: .*'lm_head'"),
    ("bert", BitFitConfig(biases=["query", "kye"]), "BitFit: biases: .*'kye'.*'key'"),
    ("bert", BitFitConfig(biases=["word_embeddings"]), "BitFit: biases: .*'word_embeddings'"),
]


@pytest.mark.parametrize(("kind", "config", "message"), NAMES_OF_NOTHING)
def test_unmatched_name_is_refused(kind, config, message):
    """Also together with names that match; the model is not changed."""
    model = make(kind)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == before


def test_a_string_is_one_name(tmp_path):
    model = get_peft_model(make("llama"), LoraConfig(modules_to_save="lm_head"))
    assert model.peft_config["default"].modules_to_save == ("lm_head",)
    assert "default.0.lm_head.weight" in [name for name, p in model.adapters.named_parameters() if p.requires_grad]
    model.save_pretrained(tmp_path, selected_adapters="default")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    with pytest.raises(ValueError, match="must be one of"):
        model.save_pretrained(tmp_path, selected_adapters=["defualt"])


def test_a_file_may_name_modules_of_other_models(hf_peft, tmp_path):
    """Users share one list of targets for all models; the tensors of the file determine the adapted modules."""
    config = hf_peft.LoraConfig(target_modules=["q_proj", "query_key_value"], modules_to_save=["score"])
    hf_peft.get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    assert len(PeftModel.from_pretrained(make("llama"), tmp_path).injector.adapted_layers()) == 2


def test_head_with_other_name_is_excluded():
    with pytest.warns(UserWarning, match="name the head to train in modules_to_save"):
        get_peft_model(make("llama"), LoraConfig(task_type="SEQ_CLS"))


def test_all_linear_warns_about_omitted_experts():
    model = nn.Sequential(nn.Linear(8, 8))
    model.experts = nn.ParameterDict({"up": nn.Parameter(torch.zeros(2, 8, 8))})
    with pytest.warns(UserWarning, match=r"leaves out 1 expert weights .*experts.up"):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))


class ReadsAWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.called(x @ self.read.weight.T)


@pytest.mark.parametrize("quantized", [False, True])
def test_uncalled_layer_is_refused_by_name_and_excluded_from_all_linear(quantized):
    model = nn.Sequential(ReadsAWeight())
    if quantized:
        qk.replace_linear(model)
    with pytest.raises(ValueError, match=r"target_modules: 0\.read must be called by the model, got .* ReadsAWeight"):
        qk.peft.get_peft_model(model, qk.peft.LoraConfig(target_modules=["read"]))
    adapted = qk.peft.get_peft_model(model, qk.peft.LoraConfig(target_modules="all-linear"))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert names
    assert not any("read" in name for name in names)
