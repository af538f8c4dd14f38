"""Configurations refuse values of the wrong type by name, from code and from files."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_kernels.peft import METHODS, LoraConfig, PromptTuningConfig
from qlora_kernels.peft.core.field_types import admits, field_types
from qlora_kernels.peft.framework.registry import config_from_dict

WRONG = [object(), {"a": object()}, [object()]]
"""Values that are invalid for every field of every configuration."""

REQUIRED = {"AdaLoraConfig": {"total_step": 10}, "AdapterFusionConfig": {"adapters": ["a", "b"]}}


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.__name__)
def test_every_field_type_is_checked(config):
    for name, hint in field_types(config).items():
        if "Any" in str(hint):
            continue
        for value in WRONG:
            with pytest.raises(ValueError, match=f"{config.__name__}: {name} must be "):
                config(**{**REQUIRED.get(config.__name__, {}), name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"r": 1.5},
        {"r": True},
        {"r": "8"},
        {"r": None},
        {"use_rslora": "false"},
        {"use_rslora": 1},
        {"lora_alpha": "16"},
        {"lora_dropout": [0.1]},
        {"target_modules": ["q_proj", 3]},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": b"q_proj"},
        {"rank_pattern": None},
        {"rank_pattern": [["q_proj", 4]]},
        {"rank_pattern": {"q_proj": "4"}},
        {"alpha_pattern": {1: 4}},
        {"layers_to_transform": "1"},
        {"bias": 1},
        {"task_type": 3},
    ],
    ids=str,
)
def test_wrong_types_are_refused(values):
    [name] = values
    with pytest.raises(ValueError, match=f"LoraConfig: {name} must be "):
        LoraConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"r": np.int64(4)},
        {"lora_alpha": 16, "lora_dropout": 0},
        {"lora_alpha": np.float32(16)},
        {"target_modules": {"q_proj": 1}.keys()},
        {"target_modules": frozenset(["q_proj"])},
        {"target_modules": "all-linear", "modules_to_save": "score"},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}},
        {"layers_to_transform": range(3)},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_right_types_are_accepted(values):
    LoraConfig(**values)


@pytest.mark.parametrize("task_type", ["CAUSAL", "seq_cls", "SEQ_CLASSIFICATION"])
def test_unknown_task_types_are_refused(task_type):
    """With an unknown name, the head of the task would be neither trained nor saved."""
    with pytest.raises(ValueError, match=r"LoraConfig: task_type must be one of \['CAUSAL_LM'"):
        LoraConfig(task_type=task_type)


def test_null_in_a_file_is_the_default():
    config = config_from_dict({"peft_type": "LORA", "r": 4, "rank_pattern": None, "use_dora": None, "revision": None})
    assert config == LoraConfig(r=4)
    assert admits(field_types(PromptTuningConfig)["tokenizer_kwargs"], None)
    with pytest.raises(ValueError, match="LoraConfig: r must be int, got '4'"):
        config_from_dict({"peft_type": "LORA", "r": "4"})
