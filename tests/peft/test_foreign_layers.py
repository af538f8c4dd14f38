"""LoRA over layers that bitsandbytes has quantized: a merge is right, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import BitFitConfig, FullFTConfig, LoraConfig, PeftModel, get_peft_model
from qlora_kernels.peft.layers.foreign_layer import bitsandbytes_weight
from tests.peft.models import VOCAB, batch, logits, randomize
from tests.support.tolerances import Expected, assert_same_function, assert_within, gamma

bnb = pytest.importorskip("bitsandbytes", reason="dev dependency bitsandbytes is not installed")

KINDS = {
    "nf4": lambda: bnb.nn.Linear4bit(128, 64, quant_type="nf4"),
    "fp4_single": lambda: bnb.nn.Linear4bit(128, 64, quant_type="fp4", compress_statistics=False),
    "nf4_in_bf16": lambda: bnb.nn.Linear4bit(128, 64, quant_type="nf4", quant_storage=torch.bfloat16),
    "int8": lambda: bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False),
    "int8_outliers": lambda: bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0),
}


def model_of(kind):
    torch.manual_seed(0)
    layer = KINDS[kind]()
    layer.load_state_dict(nn.Linear(128, 64).state_dict())
    return nn.Sequential(layer.to("cpu"), nn.Linear(64, 64)).to(torch.bfloat16)


def exact_in_int8(rows):
    """Return bf16 inputs that an int8 layer quantizes without error, except its outliers (above 6).

    The codes of each row are integers up to 127 in steps of 2**-5, and two columns hold outliers.
    """
    codes = torch.randint(-126, 127, (rows, 128))
    codes[:, 0] = 127
    x = codes * 2.0**-5
    x[:, 1:3] = torch.tensor([6.5, -7.0])
    return x.to(torch.bfloat16)


@pytest.mark.parametrize("ran_in_eval", [False, True], ids=["", "ran_in_eval"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_function(kind, options, ran_in_eval):
    """Running in eval mode changes the layout of a Linear4bit on CPUs with AVX512-BF16.

    int8 layers also quantize their input, so that their inputs have exact codes. If outliers are not handled
    separately, they are left out, because they would determine the step.
    """
    x = torch.randn(5, 128, dtype=torch.bfloat16) if "int8" not in kind else exact_in_int8(5)
    if kind == "int8":
        x[:, 1:3] = 0
    base = model_of(kind)
    if ran_in_eval:
        base.eval()(x)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=4, **options))
    delta = model.base_model[0].deltas["default"]
    nn.init.normal_(delta.lora_B.weight, std=0.3)
    model.eval()
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    assert merged[0].weight.dtype == merged[0].bias.dtype == torch.bfloat16
    assert_same_function(merged(x), expected, products=4, terms=128)  # the base's, the adapter's two, the next layer's


@pytest.mark.parametrize("kind", ["nf4", "fp4_single", "nf4_in_bf16", "int8"])
def test_weights_are_those_of_bitsandbytes(kind):
    """Equal within the roundings of absmax = code * scale + offset and of its product with the weight's code.

    bitsandbytes may fuse the first two; both are at most twice as large as their sum.
    """
    layer = model_of(kind)[0]
    if kind == "int8":
        theirs = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    else:
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    value = theirs.double()
    assert_within(bitsandbytes_weight(layer), Expected(value, gamma(5, torch.float32) * value.abs()))


@pytest.mark.parametrize("kind", KINDS)
def test_unmerge_restores_layer(kind):
    base = model_of(kind)
    layer, x = base[0], torch.randn(5, 128, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
    before = model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    assert model.base_model[0].base_layer is layer
    assert_same_function(model(x), before, products=4, terms=128)


def test_unsupported_weight_codes_are_refused():
    model = get_peft_model(model_of("int8"), LoraConfig(target_modules=["0"]))
    with pytest.raises(NotImplementedError, match="target must be '16bit' or 'nf4' over a Linear8bitLt"):
        model.merge_adapter(target="same")
    assert isinstance(model.merge_and_unload(target="nf4")[0], qk.LinearNF4)
    with pytest.raises(ValueError, match="must be dense, got 1 quantized layers"):
        get_peft_model(model_of("nf4"), FullFTConfig())
    with pytest.raises(ValueError, match="modules_to_save: 0 must not be quantized"):
        get_peft_model(model_of("nf4"), LoraConfig(target_modules=["1"], modules_to_save=["0"]))


def test_missing_biases_get_the_dtype_of_the_model():
    base = model_of("nf4")
    base[0].bias = None
    model = get_peft_model(base, BitFitConfig(add_missing=True))
    assert model.base_model[0].bias.dtype == torch.bfloat16


def test_parameters_are_counted_by_dense_shapes():
    for kind in KINDS:
        model = get_peft_model(model_of(kind), LoraConfig(target_modules=["0"], r=2))
        assert model.get_nb_trainable_parameters() == (2 * 192, 128 * 64 + 64 + 64 * 64 + 64 + 2 * 192)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("layer", ["own forward", "float8"])
def test_weight_not_used_by_forward_is_refused(layer):
    """LoRA over such a layer is right; merging into it would not be."""
    base = nn.Sequential(Doubled(32, 32))
    if layer == "float8":
        base = nn.Sequential(nn.Linear(32, 32))
        base[0].weight.data = base[0].weight.data.to(torch.float8_e4m3fn)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
    with pytest.raises(NotImplementedError, match=r"base layer: must be an nn.Linear, .* got (Doubled|Linear): its"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="base layer"):
        get_peft_model(copy.deepcopy(model.unload()), LoraConfig(target_modules=["0"], use_dora=True))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_merged_transformers_model_reloads(tmp_path, bits, targets):
    """Its configuration lists the layers that are still quantized; dense ones must not be quantized again."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)  # bitsandbytes' CPU kernel needs N % 32 == 0
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    loading = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    auto = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(tmp_path / "dense", quantization_config=loading, dtype=torch.bfloat16, device_map="cpu")
    model = get_peft_model(base, LoraConfig(target_modules=targets, r=4)).eval()
    randomize(model)
    inputs = batch("llama")
    merged = model.merge_and_unload()
    expected = logits(merged, inputs)
    merged.save_pretrained(tmp_path / "merged")
    again = auto.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16, device_map="cpu").eval()
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert hasattr(again.config, "quantization_config") == (targets != "all-linear")
    assert_same_function(logits(again, inputs), expected, terms=64)


def test_subclass_with_same_forward_merges(tmp_path):
    """Falcon's layers are subclasses of nn.Linear with their own forward."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    base = transformers.FalconForCausalLM(config).eval()
    quantized = copy.deepcopy(base)
    assert len(qk.replace_linear(quantized).replaced) == 4
    ids = torch.arange(8).view(1, 8)
    for model in (base, quantized):
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
        expected = adapted(ids).logits
        merged = adapted.merge_and_unload()
        assert_same_function(merged(ids).logits, expected)
        merged.save_pretrained(tmp_path / "merged")
        again = transformers.FalconForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert_same_function(again(ids).logits, expected)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_saving_with_input_embeddings_without_table(tmp_path, kind):
    """The input embeddings of ViT cut an image into patches; transformers raises for those of CLIP."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    if kind == "vit":
        base = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **image))
    else:
        text = {**sizes, "vocab_size": 8}
        base = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config={**sizes, **image}))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    stored = [dict(each.adapters["default"].named_parameters()) for each in (model, again)]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())


class Router(nn.Linear):
    """A router like that of Llama 4."""

    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.up = Router(8, 2), nn.Linear(8, 8)

    def forward(self, x):
        return self.up(x) * self.router(x)[0][..., :1]


def test_a_router_is_no_linear_layer():
    model = get_peft_model(Routed(), LoraConfig(target_modules="all-linear"))
    assert list(model.injector.adapted_layers()) == ["up"]
    model(torch.zeros(1, 8))
    with pytest.raises(
        TypeError, match=r"router must be a linear layer, an nn\.Embedding or a convolution, got Router"
    ):
        get_peft_model(Routed(), LoraConfig(target_modules=["router"]))
