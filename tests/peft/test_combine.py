"""All parts of adapters that are combined, merged with others present, or deleted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.peft.models import randomize
from tests.support.tolerances import assert_same_function


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.lin(self.embed(ids)).relu())


IDS = torch.arange(11)


def model_with(*configs: LoraConfig) -> PeftModel:
    """Return a model with adapters a, b, ..., none of which is the identity."""
    torch.manual_seed(0)
    model = PeftModel(Net())
    for name, config in zip("abc", configs, strict=False):
        model.add_adapter(name, config)
        model.set_adapter(name)
        randomize(model, seed=ord(name))
    return model.eval()


def output(model: nn.Module, *active: str) -> torch.Tensor:
    if active:
        model.set_adapter(active)
    with torch.no_grad():
        return model(IDS)


PARTS = {
    "head": {"modules_to_save": ["head"]},
    "biases": {"bias": "all"},
    "bias of the layer": {"bias": "lora_only"},
    "embedding": {"target_modules": ["embed", "lin"]},
    "embedding trained": {"modules_to_save": ["embed"]},
    "all": {"bias": "all", "modules_to_save": ["head"], "target_modules": ["embed", "lin"]},
}


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_combination_of_one_adapter_equals_it(tmp_path, options, kind):
    """Every part of the combination is right, also in the file and after loading it."""
    model = model_with(LoraConfig(**{"target_modules": ["lin"], "r": 2, **options}))
    expected = output(model, "a")
    model.add_weighted_adapter(["a"], [1.0], "sum", kind)
    assert_same_function(output(model, "sum"), expected)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(model_with().base_model, tmp_path / "sum").eval()
    assert_same_function(output(again), expected)


def test_biases_add_up_as_updates():
    model = model_with(*[LoraConfig(target_modules=["lin"], bias="all")] * 2)
    methods = [model.injector.adapters[name][0] for name in "ab"]
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", "cat")
    total = model.injector.adapters["sum"][0].overrides
    for path, base in total.originals.items():
        a, b = (method.overrides.copies[path] for method in methods)
        assert_same_function(total.copies[path], base + 0.5 * (a - base) + 2 * (b - base))


def test_a_head_is_taken_from_its_only_owner():
    model = model_with(LoraConfig(target_modules=["lin"]), LoraConfig(target_modules=["lin"], modules_to_save=["head"]))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", "cat")
    head, own = (model.injector.adapters[name][0].overrides.copies["head.weight"] for name in ("sum", "b"))
    assert head is not own
    assert torch.equal(head, own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["head"]}, r"adapters \['a', 'b'\] must not both replace head.weight"),
        ({"modules_to_save": ["head"], "bias": "all"}, r"must not both replace head.weight"),
        ({"use_dora": True}, r"adapter 'a' must not have use_dora=True, DoRA's magnitudes"),
        ({"lora_bias": True}, r"adapter 'a' must not have lora_bias=True"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_incompatible_combinations_are_refused(options, message):
    model = model_with(*[LoraConfig(target_modules=["lin"], **options)] * 2)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    assert list(model.adapters) == ["a", "b"]


@pytest.mark.parametrize("active", ["a", "b"])
def test_merging_an_adapter_keeps_its_head(active):
    """The result does not depend on the adapter that was active before; each has a head of its own."""
    model = model_with(*[LoraConfig(target_modules=["lin"], modules_to_save=["head"])] * 2)
    expected = output(model, "b")
    model.set_adapter(active)
    assert_same_function(output(model.merge_and_unload(adapter_names="b")), expected)


def test_merging_two_heads_is_refused():
    model = model_with(*[LoraConfig(target_modules=["lin"], modules_to_save=["head"])] * 2)
    with pytest.raises(ValueError, match=r"merge: adapters \['a', 'b'\] must not replace the same parameters"):
        model.merge_and_unload(adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="merge: adapter 'a' must be active, since it replaces head"):
        model.merge_adapter(["a"])


def test_deleting_the_active_adapter_makes_another_active():
    config = LoraConfig(target_modules=["lin"], modules_to_save=["head"])
    model = model_with(config, config)
    expected = output(model, "b")
    model.set_adapter("a")
    with pytest.warns(UserWarning, match="'a' was active; 'b' is active now"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert_same_function(output(model), expected)
    assert all(p.requires_grad for p in model.adapters["b"].parameters())
    model.delete_adapter("b")
    with pytest.raises(ValueError, match="active_adapter: an adapter must be active"):
        _ = model.active_adapter
    assert_same_function(output(model), output(model_with().base_model))


def test_deleting_keeps_merged_and_active_adapters():
    """The other adapters do not change; a merged adapter cannot be deleted."""
    model = model_with(*[LoraConfig(target_modules=["lin"])] * 3)
    model.set_adapter(["a", "b"])
    model.merge_adapter()
    expected = output(model)
    with pytest.raises(ValueError, match="delete_adapter: 'a' must not be merged; call unmerge_adapter first"):
        model.delete_adapter("a")
    model.delete_adapter("c")
    assert_same_function(output(model), expected)
    model.unmerge_adapter()
    expected = output(model, "b")
    model.set_adapter(["a", "b"])
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert_same_function(output(model), expected)


def test_combination_of_frozen_adapters_is_frozen():
    model = model_with(*[LoraConfig(target_modules=["lin"])] * 2)
    model.set_adapter("a", inference_mode=True)
    with pytest.warns(UserWarning, match="'b' is active now"):
        model.delete_adapter("a")
    assert not any(p.requires_grad for p in model.parameters())


def test_one_adapter_alone_is_named_in_the_config():
    model = get_peft_model(Net(), LoraConfig(target_modules=["lin"], modules_to_save="head", bias="all"))
    model.add_weighted_adapter(["default"], [1.0], "sum", "cat")
    config = model.peft_config["sum"]
    assert (config.modules_to_save, config.bias) == (["head"], "all")
