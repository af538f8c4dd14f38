"""LoRA and DoRA of convolutions and embeddings, compared with PEFT: outputs, gradients, merges and files."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.peft.models import randomize
from tests.support.tolerances import assert_same_function

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d, (4, 6, 3), {"padding": 1}, (2, 4, 9)),
    "conv1d_strided": (nn.Conv1d, (4, 6, 3), {"stride": 2, "bias": False}, (2, 4, 9)),
    "conv2d": (nn.Conv2d, (3, 6, (3, 2)), {"stride": (2, 1), "padding": "valid"}, (2, 3, 7, 8)),
    "conv2d_pointwise": (nn.Conv2d, (3, 6, 1), {}, (2, 3, 4, 4)),
    "conv3d": (nn.Conv3d, (2, 4, 2), {"padding": 1}, (2, 2, 4, 3, 3)),
    "conv2d_groups": (nn.Conv2d, (4, 6, 3), {"groups": 2, "padding": 1}, (2, 4, 5, 5)),
}
MERGEABLE = [name for name in CONVOLUTIONS if name != "conv2d_groups"]
OPTIONS = [{}, {"use_dora": True}, {"lora_bias": True, "use_rslora": True, "r": 2, "lora_alpha": 7}]


class Net(nn.Module):
    """One layer in a model of its own, as PEFT needs it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def convolution(name):
    kind, sizes, options, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    return Net(kind(*sizes, **options)), torch.randn(shape)


def config(module, **options):
    return module.LoraConfig(**{"r": 4, "target_modules": ["layer"], **options})


@pytest.mark.parametrize("options", OPTIONS, ids=["lora", "dora", "lora_bias"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_outputs_gradients_and_files_equal_peft(name, options, hf_peft, clone, tmp_path):
    base, x = convolution(name)
    if name == "conv2d_groups" and "use_dora" in options:
        with pytest.raises(NotImplementedError, match="use_dora must be False for a convolution with groups"):
            get_peft_model(base, config(qk.peft, **options))
        return
    if base.layer.bias is None and "lora_bias" in options:
        pytest.skip("PEFT refuses lora_bias for layers without a bias")
    theirs = hf_peft.get_peft_model(clone(base), config(hf_peft, **options))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(clone(base), tmp_path / "theirs", is_trainable=True)
    (y, grads), (expected, expected_grads) = (outputs_and_gradients(model.train(), x) for model in (ours, theirs))
    assert_same_function(y, expected, products=3)
    assert grads.keys() == expected_grads.keys()
    for key, grad in grads.items():
        assert_same_function(grad, expected_grads[key], str(key), products=6)
    ours.save_pretrained(tmp_path / "ours")
    again = hf_peft.PeftModel.from_pretrained(clone(base), tmp_path / "ours")
    assert_same_function(again(x), y, products=3)


def outputs_and_gradients(model, x):
    """Return the output, and the gradients of the input and of the parameters by the part of their names that both
    libraries have."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = tuple(part for part in name.split(".") if part.startswith("lora_") or part == "bias")
            grads[key] = parameter.grad
    return y.detach(), {**grads, "x": x.grad}


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=["lora", "dora", "lora_bias"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_merging(name, options):
    base, x = convolution(name)
    start = base(x)
    model = get_peft_model(base, config(qk.peft, **options)).eval()
    assert_same_function(model(x), start, products=3)
    randomize(model)
    model.add_adapter("second", config(qk.peft, r=2, init_lora_weights=False))
    for active in ("default", ["default", "second"]):
        model.set_adapter(active)
        expected = model(x)
        model.merge_adapter(safe_merge=True)
        assert_same_function(model(x), expected, products=3)
        model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), start)
    merged = model.merge_and_unload("nf4")
    assert type(merged.layer) is CONVOLUTIONS[name][0]
    assert_same_function(merged(x), expected, products=3)


@torch.no_grad()
def test_rows_of_a_batch_and_weighted_sums():
    base, x = convolution("conv2d")
    model = get_peft_model(base, config(qk.peft, init_lora_weights=False)).eval()
    model.add_adapter("second", config(qk.peft, r=2, use_dora=True, init_lora_weights=False))
    model.add_adapter("third", config(qk.peft, r=2, init_lora_weights=False))
    names = ["second", "default"]
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert_same_function(mixed[row], model(x)[row], products=3)
    model.set_adapter(["default", "third"])
    expected = model(x)
    model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    assert_same_function(model(x), expected, products=3)


@torch.no_grad()
def test_weight_that_is_computed_in_the_forward():
    """The positional convolution of wav2vec 2.0 has weight_norm; merging leaves a plain convolution."""
    base = Net(weight_norm(nn.Conv1d(4, 6, 3)))
    x = torch.randn(2, 4, 9)
    model = get_peft_model(base, config(qk.peft, init_lora_weights=False)).eval()
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged.layer) is nn.Conv1d
    assert_same_function(merged(x), expected, products=3)


@torch.no_grad()
def test_dilation_and_padding_modes():
    """The update has those of its layer; PEFT's pads with zeros and does not dilate, which its merge contradicts."""
    layer = nn.Conv2d(3, 6, 3, dilation=2, padding=2, padding_mode="reflect")
    x = torch.randn(2, 3, 7, 8)
    model = get_peft_model(Net(layer), config(qk.peft, init_lora_weights=False)).eval()
    expected = model(x)
    model.merge_adapter()
    assert_same_function(model(x), expected, products=3)


def test_refusals():
    grouped, x = convolution("conv2d_groups")
    with pytest.raises(ValueError, match="r must be divisible by the groups of a convolution, 2, got 3"):
        get_peft_model(grouped, config(qk.peft, r=3))
    model = get_peft_model(grouped, config(qk.peft, init_lora_weights=False))
    assert not torch.equal(model(x), grouped.layer.base_layer(x))
    with pytest.raises(ValueError, match="layer is a convolution with groups"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match=r"init_lora_weights must be a bool or 'gaussian' .* got 'pissa'"):
        get_peft_model(convolution("conv2d")[0], config(qk.peft, init_lora_weights="pissa"))
    with pytest.raises(TypeError, match=r"layer must be a linear layer, an nn\.Embedding or a convolution"):
        get_peft_model(Net(nn.ConvTranspose1d(4, 4, 3)), config(qk.peft))


def test_quantization_leaves_convolutions_dense():
    model = nn.Sequential(nn.Conv1d(64, 64, 1), nn.Linear(64, 64))
    qk.replace_linear(model)
    assert [type(layer) for layer in model] == [nn.Conv1d, qk.LinearNF4]


@pytest.mark.parametrize("family", ["whisper", "clip"])
def test_convolutions_of_transformers(family, hf_peft, clone, tmp_path):
    """Models that read attributes of their convolutions, beside calling them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1}
    if family == "whisper":
        whisper = transformers.WhisperConfig(
            vocab_size=48, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2
        )
        whisper.update({"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "max_source_positions": 10})
        whisper.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1})
        base = transformers.models.whisper.modeling_whisper.WhisperEncoder(whisper)
        inputs, targets = {"input_features": torch.randn(2, 8, 20)}, ["conv1", "conv2", "q_proj"]
    else:
        clip = transformers.CLIPVisionConfig(
            **sizes, intermediate_size=16, num_attention_heads=2, image_size=8, patch_size=4
        )
        base = transformers.CLIPVisionModel(clip)
        inputs, targets = {"pixel_values": torch.randn(2, 3, 8, 8)}, ["patch_embedding", "q_proj"]
    base.eval()
    options = {"r": 4, "target_modules": targets, "init_lora_weights": False}
    ours = get_peft_model(clone(base), LoraConfig(**options)).eval()
    y = ours(**inputs).last_hidden_state
    assert (y - base(**inputs).last_hidden_state).abs().max() > 1e-4
    if family == "whisper":  # PEFT's wrapper lacks the stride that Whisper reads
        return
    ours.save_pretrained(tmp_path)
    theirs = hf_peft.PeftModel.from_pretrained(clone(base), tmp_path).eval()
    assert_same_function(theirs(**inputs).last_hidden_state, y)
