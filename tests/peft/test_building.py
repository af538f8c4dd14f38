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


@pytest.mark.parametrize("wrong", ["LORA", {"r": 8}, LoraConfig, 8])
def test_other_objects_are_refused_as_configurations(wrong: object) -> None:
    with pytest.raises(TypeError, match="peft_config must be a configuration such as"):
        get_peft_model(make("llama"), wrong)


def test_only_modules_are_adapted() -> None:
    for refuse in (lambda: get_peft_model("my-model", LoraConfig()), lambda: PeftModel.from_pretrained("m", "adapter")):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str; load it first"):
            refuse()


def test_names_of_hugging_face_peft_have_a_hint() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'TaskType': use names, as in task_type=\"CAUSAL_LM\""):
        peft.TaskType  # noqa: B018
    assert not hasattr(peft, "anything_else")
