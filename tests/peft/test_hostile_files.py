"""Adapter folders with arbitrary contents: each is refused with an error that names the field or the tensor."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_kernels import peft
from qlora_kernels.peft import PeftModel, get_peft_model
from tests.peft.models import make


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return (config, tensors) of a small LoRA adapter."""
    folder = tmp_path_factory.mktemp("good")
    get_peft_model(net(), peft.LoraConfig(target_modules=["0"], r=2)).save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def load(folder, config, tensors, base=net):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return PeftModel.from_pretrained(base(), folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", "8", "r must be int, got '8'"),
        ("r", 2.0, "r must be int"),
        ("r", True, "r must be int"),
        ("r", [2], "r must be int"),
        ("r", -1, "r must be >= 1"),
        ("r", 10**12, r"the rank of 0 must be that of its tensors, of shape \[2, 8\], got 1000000000000"),
        ("r", 3, "the rank of 0 must be that of its tensors"),
        ("rank_pattern", {"0": 10**12}, "the rank of 0 must be that of its tensors"),
        ("rank_pattern", {"0": "x"}, "rank_pattern must be"),
        ("rank_pattern", ["0"], "rank_pattern must be"),
        ("lora_alpha", float("nan"), "must be finite, got NaN"),
        ("lora_alpha", float("-inf"), "must be finite, got -Infinity"),
        ("lora_alpha", 10**400, "lora_alpha must be float"),
        ("lora_alpha", "16", "lora_alpha must be float"),
        ("alpha_pattern", {"0": float("nan")}, "must be finite"),
        ("lora_dropout", float("nan"), "must be finite"),
        ("use_rslora", "false", "use_rslora must be bool, got 'false'"),
        ("use_dora", 1, "use_dora must be bool"),
        ("bias", "everything", "bias must be"),
        ("target_modules", 3, "target_modules must be"),
        ("target_modules", [3], "target_modules must be"),
        ("target_modules", {"0": 1}, "target_modules must be"),
        ("target_modules", ["0", "2"], "missing the lora_A of 2, which adapter_config.json targets"),
        ("layers_to_transform", "0", "layers_to_transform must be"),
        ("modules_to_save", 7, "modules_to_save must be"),
        ("modules_to_save", ["2"], "missing"),
        ("init_lora_weights", "nothing", "init_lora_weights must be"),
        ("init_lora_weights", {}, "init_lora_weights must be"),
        ("task_type", ["CAUSAL_LM"], "task_type must be"),
        ("peft_type", "LORA2", "peft_type must be one of"),
        ("peft_type", None, "peft_type must be one of"),
        ("peft_type", ["LORA"], "peft_type must be one of"),
    ],
    ids=str,
)
def test_configurations(tmp_path, stored, field, value, message):
    config, tensors = stored
    with pytest.raises(ValueError, match=message):
        load(tmp_path, {**config, field: value}, tensors)


def test_null_means_the_default(tmp_path, stored):
    config, tensors = stored
    nothing = dict.fromkeys(("rank_pattern", "alpha_pattern", "loftq_config", "use_dora", "layers_pattern"))
    load(tmp_path, {**config, **nothing}, tensors)


@pytest.mark.filterwarnings("ignore:.*differs from the file that was saved")
def test_allocations_are_bounded_by_file_size(tmp_path):
    """The sizes in the configurations of all methods are checked without the time of allocating."""
    huge = 10**9
    for i, (config, field) in enumerate(
        [
            (peft.PromptTuningConfig(num_virtual_tokens=2), "num_virtual_tokens"),
            (peft.PTuningConfig(num_virtual_tokens=2, encoder_hidden_size=8), "encoder_hidden_size"),
            (peft.PrefixTuningConfig(num_virtual_tokens=2, encoder_hidden_size=8), "encoder_hidden_size"),
            (peft.AdapterConfig(bottleneck_size=4), "bottleneck_size"),
            (peft.MAMConfig(prefix_length=2, bottleneck_size=4), "prefix_length"),
            (peft.UniPELTConfig(prefix_length=2), "lora_r"),
            (peft.AdaLoraConfig(total_step=9), "init_r"),
        ]
    ):
        folder = tmp_path / str(i)
        get_peft_model(make("llama", layers=1), config).save_pretrained(folder)
        values = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**values, field: huge}))
        with pytest.raises(ValueError, match=f"{field}|rank of"):
            PeftModel.from_pretrained(make("llama", layers=1), folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_are_finite(tmp_path, stored, value):
    config, tensors = stored
    key = "base_model.model.0.lora_A.weight"
    bad = {**tensors, key: tensors[key].clone()}
    bad[key][1, 3] = value
    with pytest.raises(ValueError, match=f"{key} must be finite"):
        load(tmp_path, config, bad)


def test_tensors_are_floats(tmp_path, stored):
    config, tensors = stored
    for dtype in (torch.int32, torch.bool):
        integers = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        with pytest.raises(ValueError, match=r"0.lora_A.weight must be of a type like torch.float32"):
            load(tmp_path, config, integers)


def test_users_mistake_is_named():
    for config, message in [
        ({"r": "8"}, "LoraConfig: r must be int, got '8'"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be float"),
        ({"target_modules": [None]}, "target_modules must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            peft.LoraConfig(**config)
