"""Our PeftModel where other libraries expect Hugging Face PEFT's: its class, attributes, files and state dicts."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import qlora_kernels as qk

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from .tiny_models import assert_same_model, build  # noqa: E402
from .trainer_runs import adapted  # noqa: E402


def test_is_instance_of_hugging_face_peft_model():
    model = adapted()
    assert isinstance(model, (peft.PeftModel, qk.peft.PeftModel))
    assert type(model) is qk.peft.PeftModel
    assert isinstance(copy.deepcopy(model), peft.PeftModel)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert type(again) is qk.peft.PeftModel
    assert_same_model(again, model)


def test_attributes_of_the_base_model(tmp_path):
    model = adapted()
    base = model.get_base_model()
    for name in ("config", "dtype", "device", "generation_config", "main_input_name"):
        assert getattr(model, name) is getattr(base, name) or getattr(model, name) == getattr(base, name)
    assert model.get_input_embeddings() is base.get_input_embeddings()
    model.add_model_tags(["a tag"])
    assert base.model_tags == ["a tag"]
    assert not getattr(model, "is_quantized", False)
    base.hf_device_map = {"": "cpu"}
    assert model.hf_device_map == {"": "cpu"}


def test_load_adapter_refuses_another_configuration(tmp_path):
    adapted().save_pretrained(tmp_path)
    other = adapted(lora_alpha=3)
    with pytest.raises(ValueError, match=r"same configuration.*lora_alpha"):
        other.load_adapter(tmp_path)


def test_save_options(tmp_path):
    """Values that a Trainer has gathered are saved in place of the model's own, which stay."""
    model = adapted()
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gathered = {name: p.detach() + 1 for name, p in own.items()}
    name = next(iter(gathered))
    with pytest.raises(ValueError, match=rf"state_dict: {name} must be the whole tensor, of shape .*, got the shape"):
        model.save_pretrained(tmp_path, state_dict={**gathered, name: gathered[name][:1]})
    model.save_pretrained(tmp_path / "ignored", state_dict=gathered, is_main_process=False)
    assert not (tmp_path / "ignored").exists()
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert all(p is own[name] for name, p in model.named_parameters() if p.requires_grad)
    reloaded = qk.peft.PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    assert all(torch.equal(dict(reloaded.named_parameters())[name], value) for name, value in gathered.items())


def test_functions_of_peft_copy_adapters():
    """They take models of both packages: TRL copies adapters with them, and accelerate saves shards."""
    model = adapted(modules_to_save=["norm"])
    model.add_adapter("second", model.peft_config["default"])
    assert isinstance(model, peft.PeftModel)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, state, adapter_name="second")
    copied = peft.get_peft_model_state_dict(model, adapter_name="second")
    assert copied.keys() == state.keys()
    assert any("norm" in name for name in state), list(state)
    assert all(torch.equal(copied[name], value) for name, value in state.items())
    state.popitem()
    with pytest.raises(ValueError, match="must hold the parameters of adapter 'default' and no others"):
        peft.set_peft_model_state_dict(model, state)
    theirs = peft.get_peft_model(build("tied"), peft.LoraConfig(target_modules=["q_proj"]))
    assert not peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(theirs)).unexpected_keys
