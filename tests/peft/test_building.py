"""Methods build their modules without changing the model, and attach() that fails halfway is undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kernels.peft import PeftConfig, PeftModel
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
