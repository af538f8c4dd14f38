"""torch's wrappers around the model or its parts do not appear in names: neither in targets nor in files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from qlora_kernels.peft import AdapterConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function


@pytest.fixture(autouse=True)
def _recompile():
    """Reset torch.compile, which does not notice hooks that are added after it has compiled a class's code."""
    torch.compiler.reset()


class FSDPLike(nn.Module):
    """Holds the module as torch's FSDP does, without a process group."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._fsdp_wrapped_module, name)


def compiled(module):
    return torch.compile(module, backend="eager")


def wrap_blocks(wrapper):
    def wrap(model):
        layers = model.model.layers
        for i, layer in enumerate(layers):
            layers[i] = wrapper(layer)
        return model

    return wrap


def wrap_leaf(wrapper):
    def wrap(model):
        attention = model.model.layers[0].self_attn
        attention.q_proj = wrapper(attention.q_proj)
        return model

    return wrap


WRAPS = {
    "compile": compiled,
    "data_parallel": nn.DataParallel,
    "fsdp": FSDPLike,
    "compiled data_parallel": lambda model: compiled(nn.DataParallel(model)),
    "checkpointed blocks": wrap_blocks(checkpoint_wrapper),
    "compiled blocks": wrap_blocks(compiled),
    "nested blocks": wrap_blocks(lambda layer: FSDPLike(checkpoint_wrapper(layer))),
    "fsdp over checkpointed blocks": lambda model: FSDPLike(wrap_blocks(checkpoint_wrapper)(model)),
    "fsdp leaf": wrap_leaf(FSDPLike),
}

CONFIG = LoraConfig(
    r=2,
    target_modules=["model.layers.0.self_attn.q_proj", "v_proj", "down_proj"],
    modules_to_save=["model.norm", "lm_head"],
    rank_pattern={r"model\.layers\.1\.self_attn\.v_proj": 3},
)
HOOKED = AdapterConfig(placement="pfeiffer", bottleneck_size=4)


def stored(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:.*does not synchronize parameters")
@pytest.mark.parametrize(
    ("wrap", "config"),
    [(wrap, CONFIG) for wrap in WRAPS.values()] + [(WRAPS[name], HOOKED) for name in ("compile", "nested blocks")],
    ids=[*WRAPS, "hooks, compile", "hooks, nested blocks"],
)
def test_files_are_those_of_the_plain_model(tmp_path, wrap, config):
    """In both directions: an adapter of the wrapped model fits the plain one and the reverse."""
    plain = get_peft_model(make("llama"), config).eval()
    names = set(stored(plain, tmp_path / "plain"))
    model = get_peft_model(wrap(make("llama")), config).eval()
    randomize(model)
    inputs = batch("llama")
    expected = logits(model, inputs)
    assert set(stored(model, tmp_path / "wrapped")) == names
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "wrapped")
    assert_same_function(logits(again, inputs), expected)
    back = PeftModel.from_pretrained(wrap(make("llama")), tmp_path / "wrapped")
    assert_same_function(logits(back, inputs), expected)
    if config is CONFIG:
        assert_same_function(logits(back.merge_and_unload(), inputs), expected)


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, FSDPLike, compiled])
def test_wrappers_added_after_the_adapter(tmp_path, wrapper):
    model = get_peft_model(make("llama"), CONFIG).eval()
    randomize(model)
    inputs = batch("llama")
    expected, names = logits(model, inputs), set(stored(model, tmp_path / "before"))
    wrap_blocks(wrapper)(model.base_model)
    assert_same_function(logits(model, inputs), expected)
    assert set(stored(wrapper(model), tmp_path / "after")) == names
    model.load_adapter(tmp_path / "after", "b")
    model.set_adapter("b")
    assert_same_function(logits(model, inputs), expected)
    model.delete_adapter("default")
    model.unmerge_adapter()
    assert_same_function(logits(model.merge_and_unload(), inputs), expected)


def test_names_of_wrappers_in_file_are_ignored(tmp_path):
    """PEFT includes them in names if the base was compiled first."""
    model = get_peft_model(make("llama"), CONFIG).eval()
    randomize(model)
    tensors = stored(model, tmp_path)
    prefix = "base_model.model."
    renamed = {f"{prefix}_orig_mod.{key.removeprefix(prefix)}": value for key, value in tensors.items()}
    renamed = {key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"): v for key, v in renamed.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert_same_function(logits(again, batch("llama")), logits(model, batch("llama")))


def test_all_linear_excludes_head_of_wrapped_model():
    for wrap in (compiled, nn.DataParallel, checkpoint_wrapper):
        targets = get_peft_model(wrap(make("llama")), LoraConfig(target_modules="all-linear")).injector.adapted_layers()
        assert len(targets) == 14
        assert "lm_head" not in targets


def test_prompts_use_embedding_of_wrapped_model():
    for wrap in (compiled, nn.DataParallel):
        model = get_peft_model(wrap(make("llama")), PromptTuningConfig(num_virtual_tokens=3)).eval()
        assert logits(model, batch("llama")).shape[1] == 7


def test_separately_compiled_layer_is_refused():
    with pytest.raises(ValueError, match=r"q_proj must not be compiled by itself"):
        get_peft_model(wrap_leaf(compiled)(make("llama")), LoraConfig(target_modules=["q_proj"]))


def test_parallel_wrappers_belong_outside():
    with pytest.warns(UserWarning, match="FSDPLike does not synchronize parameters"):
        get_peft_model(FSDPLike(make("llama")), CONFIG)
