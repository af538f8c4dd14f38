"""Methods build their modules without changing the model, and attach() that fails halfway is undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kernels import peft
from qlora_kernels.peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from qlora_kernels.peft.framework.registry import method_for
from qlora_kernels.peft.model.adapters import as_configs
from tests.peft.cases import CASES, build
from tests.peft.models import make


def state_of(model: nn.Module) -> list[tuple]:
    """Return what an adapter changes in a model: its modules, their classes, hooks, parameters and buffers."""
    return [
        (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks), *map(id, m._parameters.values()), *m._buffers)
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("case", [case for case in CASES if case != "fusion"])
def test_building_a_method_changes_nothing(case: str) -> None:
    torch.manual_seed(0)
    model = PeftModel(make("llama").requires_grad_(False))
    before = state_of(model)
    for config in as_configs(CASES[case].config):
        assert isinstance(config, PeftConfig)
        method_for(config)(config, model.injector, "built")
        assert state_of(model) == before


@pytest.mark.parametrize("case", ["unipelt", "prompt+lora+pfeiffer", "fusion", "bitfit"])
def test_failed_attach_leaves_the_model_as_it_was(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(case, "llama")
    model.delete_adapter("default")
    before = state_of(model)
    last = as_configs(CASES[case].config)[-1]
    method = method_for(last)
    attach = method.attach

    def fail(self: object) -> None:
        attach(self)
        raise RuntimeError("planted")

    monkeypatch.setattr(method, "attach", fail)
    with pytest.raises(RuntimeError, match="planted"):
        model.add_adapter("default", CASES[case].config)
    assert state_of(model) == before
    assert "default" not in model.adapters


@pytest.mark.parametrize("wrong", ["LORA", {"r": 8}, LoraConfig, 8, None])
def test_other_objects_are_refused_as_configurations(wrong: object) -> None:
    with pytest.raises(TypeError, match="peft_config must be a configuration such as"):
        get_peft_model(make("llama"), wrong)


@pytest.mark.parametrize("none", [[], ()], ids=str)
def test_no_configuration_is_refused(none: list[LoraConfig]) -> None:
    with pytest.raises(ValueError, match="peft_config must hold at least one configuration, got none"):
        get_peft_model(make("llama"), none)


def test_configurations_may_come_from_a_generator() -> None:
    model = get_peft_model(make("llama"), (config for config in [LoraConfig(r=2, target_modules=["q_proj"])]))
    assert model.adapters["default"]


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="add_adapter: adapter_name must be a string, got NoneType"):
        get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]), None)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_what_is_no_regular_expression_is_refused(field: str) -> None:
    settings = {"target_modules": ["q_proj"], field: "layers["}
    if field == "layers_pattern":
        settings["layers_to_transform"] = 0
    with pytest.raises(ValueError, match=r"regular expression, got 'layers\[' \(unterminated"):
        get_peft_model(make("llama"), LoraConfig(r=2, **settings))


def test_a_single_layer_is_refused() -> None:
    for targets in ("all-linear", ".*"):
        with pytest.raises(ValueError, match=r"got a single layer; use nn.Sequential\(layer\)"):
            get_peft_model(nn.Linear(8, 8), LoraConfig(r=2, target_modules=targets))


def test_only_modules_are_adapted() -> None:
    for refuse in (lambda: get_peft_model("my-model", LoraConfig()), lambda: PeftModel.from_pretrained("m", "adapter")):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str; load it first"):
            refuse()


def test_names_of_hugging_face_peft_have_a_hint() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'TaskType': use names, as in task_type=\"CAUSAL_LM\""):
        peft.TaskType  # noqa: B018
    assert not hasattr(peft, "anything_else")
