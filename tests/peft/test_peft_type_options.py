"""Options, dropout, limits and errors of the adapter types that PEFT has too; test_peft_types.py compares outputs."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from qlora_kernels import peft
from qlora_kernels.peft import PeftModel, get_peft_model
from qlora_kernels.peft.methods import ia3, lokr
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function


def test_ia3_default_layers_equal_peft():
    """For each type of model for which PEFT knows them."""
    constants = pytest.importorskip("peft.utils.constants")
    targets, feedforward = (
        getattr(constants, f"TRANSFORMERS_MODELS_TO_IA3_{which}_MODULES_MAPPING") for which in ("TARGET", "FEEDFORWARD")
    )
    ours = {kind: pair for pair, kinds in ia3._DEFAULTS.items() for kind in kinds.split()}
    assert ours == {kind: (tuple(targets[kind]), tuple(feedforward[kind])) for kind in targets}


def test_ia3_over_all_linear_layers_loads_in_peft(hf_peft, tmp_path):
    model = get_peft_model(make("llama"), peft.IA3Config(target_modules="all-linear")).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    theirs = hf_peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    with torch.no_grad():
        assert_same_function(logits(theirs, batch("llama")), logits(model, batch("llama")))


def test_bad_ia3_configurations_are_named():
    with pytest.raises(ValueError, match=r"feedforward_modules must be some of target_modules, got \['fc'\]"):
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=["fc"])
    with pytest.raises(ValueError, match="target_modules and feedforward_modules: must be given for a model of type"):
        get_peft_model(make("torch"), peft.IA3Config())
    with pytest.raises(ValueError, match="feedforward_modules: must be given for a model of type"):
        get_peft_model(make("torch"), peft.IA3Config(target_modules="all-linear"))


def test_lokr_divides_sizes_as_peft(hf_peft):
    from peft.tuners.lokr.layer import factorization

    for dimension in (*range(1, 65), 97, 1024, 11008):
        for factor in (-1, 1, 3, 4, 8, 16, 100):
            assert lokr.factorization(dimension, factor) == factorization(dimension, factor)


@pytest.mark.parametrize(
    "options",
    [{"rank_dropout": 0.4}, {"module_dropout": 0.5}, {"rank_dropout": 0.3, "module_dropout": 0.2}],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig"])
def test_lycoris_dropout_is_pefts(hf_peft, name, options):
    """With the same random numbers the same parts of the update are left out in training, and none in use."""
    scale = {"rank_dropout_scale": True} if name == "LoKrConfig" else {}
    options |= {"r": 2, "init_weights": False, "target_modules": ["q_proj", "up_proj"]} | scale
    outputs = []
    for model in (
        get_peft_model(make("llama"), getattr(peft, name)(**options)),
        hf_peft.get_peft_model(make("llama"), getattr(hf_peft, name)(**options)),
    ):
        randomize(model.eval())
        used = logits(model, batch("llama"))
        torch.manual_seed(5)
        outputs.append((used, logits(model.train(), batch("llama"))))
    for ours, theirs in zip(*outputs, strict=True):
        assert_same_function(ours, theirs)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-4


def test_lycoris_dropout_of_everything_is_finite():
    model = get_peft_model(make("llama"), peft.LoHaConfig(r=2, rank_dropout=0.999)).train()
    randomize(model)
    assert torch.isfinite(logits(model, batch("llama"))).all()


def test_lokr_computes_no_dense_update(monkeypatch):
    """The Kronecker product itself is for merges."""
    model = get_peft_model(make("llama"), peft.LoKrConfig(r=2, target_modules="all-linear")).eval()
    monkeypatch.delattr(torch, "kron")
    logits(model, batch("llama"))


def test_loha_of_low_rank_and_vera_run_fused():
    """r * r (N + K) <= N K: the update is one of rank r * r, whose factors go into the fused op."""
    for config in (
        peft.LoHaConfig(r=2, target_modules="all-linear"),
        peft.VeraConfig(r=4, target_modules="all-linear"),
    ):
        model = get_peft_model(make("llama", nf4=True), config)
        assert set(model.explain().values()) == {"fused"}
    wide = get_peft_model(make("llama", nf4=True), peft.LoHaConfig(r=6, target_modules="all-linear"))
    assert all("not a plain low-rank update" in answer for answer in wide.explain().values())


def test_vera_projections_are_held_and_saved_once(tmp_path):
    """All layers share them, also in copies and in the state of a run; they come from the seed, or from the file."""
    config = peft.VeraConfig(r=4, target_modules=["q_proj", "up_proj"], projection_prng_key=3)
    model = get_peft_model(make("llama"), config)
    for each in (model, copy.deepcopy(model)):
        method = each.adapters["default"][0]
        assert {id(delta.projection) for delta in method.deltas.values()} == {id(method.projection)}
        assert sum("vera_A" in name for name in method.training_state()[1]) == 1
    with torch.no_grad():
        model.adapters["default"][0].projection.vera_A.mul_(2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(again.adapters["default"][0].projection.vera_A, model.adapters["default"][0].projection.vera_A)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "save_projection": False}))
    with pytest.warns(UserWarning, match="adapter_config"):
        again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(again.adapters["default"][0].projection.vera_A, model.adapters["default"][0].projection.vera_A)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("VeraConfig", {"r": 0}, "r must be >= 1"),
        ("VeraConfig", {"vera_dropout": 1.0}, "vera_dropout must be in"),
        ("VeraConfig", {"bias": "lora_only"}, "bias must be 'none', 'all' or 'vera_only'"),
        ("LoHaConfig", {"rank_pattern": {"q_proj": 0}}, "r must be >= 1"),
        ("LoKrConfig", {"module_dropout": -0.1}, "module_dropout must be in"),
        ("LoKrConfig", {"decompose_factor": 0}, "decompose_factor must be -1 or >= 1"),
        ("LoKrConfig", {"init_weights": "lyco"}, "init_weights must be a bool or 'lycoris'"),
    ],
    ids=str,
)
def test_bad_values_are_named(name, options, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        getattr(peft, name)(**options)


@pytest.mark.filterwarnings("ignore:.*adapter_config.json")
@pytest.mark.parametrize(
    ("name", "change"),
    [("VeraConfig", {"r": 10**9}), ("LoHaConfig", {"rank_pattern": {"q_proj": 10**9}}), ("LoKrConfig", {"r": 1})],
)
def test_files_with_another_rank_are_refused(tmp_path, name, change):
    get_peft_model(make("llama"), getattr(peft, name)(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match=r"must be that of its tensors|another shape"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


def test_only_lora_adapters_are_summed():
    model = get_peft_model(make("llama"), peft.LoKrConfig(r=2))
    with pytest.raises(TypeError, match="add_weighted_adapter: adapter 'default' must be a LoRA adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
