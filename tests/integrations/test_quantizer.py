"""QLoRAKernelsConfig in transformers' from_pretrained, save_pretrained and dequantize; models quantized in place."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_kernels as qk

transformers = pytest.importorskip("transformers")

from qlora_kernels.integrations import quantizer  # noqa: E402
from qlora_kernels.integrations.transformers import ModelError, QLoRAKernelsConfig, load_model  # noqa: E402
from tests.support.tolerances import assert_same_function  # noqa: E402

from .tiny_models import assert_same_model, build, logits, of_type  # noqa: E402

AUTO = transformers.AutoModelForCausalLM
KINDS = ("llama", "tied", "gpt2", "mixtral", "gpt_oss", "hrm")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """kind -> a folder that save_pretrained wrote; written once."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(folders[kind])
        return folders[kind]

    return folder


def load(folder, **options):
    return AUTO.from_pretrained(folder, quantization_config=QLoRAKernelsConfig(**options))


def in_place(kind):
    """The same model, quantized by replace_linear and replace_experts."""
    model = build(kind)
    qk.replace_linear(model)
    if kind in ("mixtral", "gpt_oss"):
        qk.replace_experts(model)
    return model


def written_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("kind", KINDS)
def test_load_save_reload_dequantize(kind, dense, tmp_path):
    expected = in_place(kind)
    model = load(dense(kind))
    assert_same_model(model, expected)
    assert model.is_quantized
    assert of_type(model, nn.Linear) == ["lm_head"]
    model.save_pretrained(tmp_path / "nf4")
    assert written_config(tmp_path / "nf4")["quant_method"] == "qlora_kernels"
    again = AUTO.from_pretrained(tmp_path / "nf4")
    assert_same_model(again, expected)
    assert_same_model(load_model(tmp_path / "nf4", torch.float32), expected)
    again.dequantize().save_pretrained(tmp_path / "dense")
    assert not again.is_quantized
    plain = AUTO.from_pretrained(tmp_path / "dense")
    assert not hasattr(plain.config, "quantization_config")
    assert not of_type(plain, qk.LinearNF4, qk.ExpertsNF4)
    assert_same_function(logits(plain), logits(expected))


def test_one_dense_weight_at_a_time(dense, monkeypatch):
    """Of the weights that are quantized, never more than one is in memory while the model loads."""
    from transformers import core_model_loading

    original, alive = core_model_loading._materialize_copy, []
    most = 0

    def counted(tensor, *args, **kwargs):
        nonlocal most
        made = original(tensor, *args, **kwargs)
        if made.dim() == 2 and made.shape[0] != 48:  # neither norms nor the embeddings
            alive.append(weakref.ref(made))
            most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(core_model_loading, "_materialize_copy", counted)
    model = load(dense("llama"))
    assert len(alive) == len(of_type(model, qk.LinearNF4)) == 14
    assert most == 1
    assert sum(ref() is not None for ref in alive) == 0


def test_blocksize_double_quant_and_compute_dtype(dense, tmp_path):
    model = load(dense("mixtral"), blocksize=128, double_quant=False, compute_dtype="bfloat16")
    layer = model.model.layers[0].self_attn.q_proj
    experts = model.model.layers[0].mlp.experts.down_proj
    assert layer.blocksize == experts.blocksize == 128
    assert layer.absmax_q is None
    assert experts.absmax_q is None
    assert layer.compute_dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = AUTO.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.q_proj.compute_dtype == torch.bfloat16
    assert_same_model(again, model)


def test_skip_modules(dense, tmp_path):
    """Names, endings of names, whole blocks, and an empty list, which quantizes the head too."""
    model = load(dense("llama"), skip_modules=["q_proj", "layers.1"])
    assert len(of_type(model, qk.LinearNF4)) == 7  # six of the first block, and the head
    model.save_pretrained(tmp_path)
    again = AUTO.from_pretrained(tmp_path)
    assert of_type(again, qk.LinearNF4) == of_type(model, qk.LinearNF4)
    assert_same_model(again, model)
    assert of_type(load(dense("tied"), skip_modules=()), nn.Linear) == ["lm_head"]
    assert not of_type(load(dense("mixtral"), skip_modules=["lm_head", "experts"]), qk.ExpertsNF4)


def test_part_of_a_fused_tensor_stays_dense(dense, tmp_path):
    """The file holds gate, q, k and v as one tensor, of which the first part is not quantized."""
    model = load(dense("hrm"), skip_modules=["lm_head", "gate_proj"])
    linears = of_type(model, nn.Linear)
    assert all(name.endswith(("gate_proj", "lm_head")) for name in linears)
    assert len(linears) == 9
    model.save_pretrained(tmp_path)
    assert_same_model(AUTO.from_pretrained(tmp_path), model)


def test_dtype_argument_on_reload(dense, tmp_path):
    load(dense("llama")).save_pretrained(tmp_path)
    model = AUTO.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def test_layers_missing_in_checkpoint_stay_dense(dense):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        dense("llama"), quantization_config=QLoRAKernelsConfig(), num_labels=3
    )
    assert of_type(model, nn.Linear) == ["score"]
    assert model.score.weight.std() > 0


def test_device_map(dense):
    expected = load(dense("llama"))
    for device_map in ("auto", "cpu", {"": "cpu"}):
        model = AUTO.from_pretrained(dense("llama"), quantization_config=QLoRAKernelsConfig(), device_map=device_map)
        assert_same_model(model, expected)
    for device_map in ({"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}):
        with pytest.raises(ValueError, match="device_map must not offload"):
            AUTO.from_pretrained(dense("llama"), quantization_config=QLoRAKernelsConfig(), device_map=device_map)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_modules": ["q_prj"]}, "skip_modules: every name must match a module, got 'q_prj'.*q_proj"),
        ({"skip_modules": ["model", "lm_head"]}, "must contain linear layers outside skip_modules"),
        ({"blocksize": 100}, "blocksize must be"),
        ({"compute_dtype": "float8"}, "compute_dtype must be one of"),
    ],
)
def test_bad_arguments(options, message, dense):
    with pytest.raises((ValueError, TypeError), match=message):
        load(dense("llama"), **options)


def test_unquantizable_weights_raise(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path)


def test_mismatch_of_config_and_files_raises(dense, tmp_path):
    load(dense("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["skip_modules"].append("q_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AUTO.from_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_model_quantized_in_place_loads_with_bitsandbytes_and_here(kind, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = in_place(kind)
    model.save_pretrained(tmp_path)
    assert written_config(tmp_path)["quant_method"] == "bitsandbytes"
    theirs = AUTO.from_pretrained(tmp_path)
    assert len(of_type(theirs, bitsandbytes.nn.Linear4bit)) == len(of_type(model, qk.LinearNF4))
    theirs.train()  # bitsandbytes packs the weight anew in eval mode on some CPUs
    torch.testing.assert_close(logits(theirs), logits(model.train()), rtol=1e-4, atol=1e-5)
    ours = load_model(tmp_path, torch.float32)
    assert_same_model(ours, model.eval())
    ours.save_pretrained(tmp_path / "again")
    assert written_config(tmp_path / "again") == written_config(tmp_path)


def test_quantized_head_loads_with_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = build("llama")
    qk.replace_linear(model, skip=("q_proj",))
    model.save_pretrained(tmp_path)
    theirs = AUTO.from_pretrained(tmp_path).train()
    assert [name.rpartition(".")[2] for name in of_type(theirs, nn.Linear)] == ["q_proj", "q_proj"]
    torch.testing.assert_close(logits(theirs), logits(model.train()), rtol=1e-4, atol=1e-5)


def test_experts_quantized_in_place_reload_in_transformers(tmp_path):
    model = in_place("mixtral")
    model.save_pretrained(tmp_path)
    assert_same_model(AUTO.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("target", ["16bit", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_model_config_matches_layers(kind, target, tmp_path):
    model = in_place(kind)
    config = qk.peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    merged = qk.peft.get_peft_model(model, config).merge_and_unload(target=target)
    merged.save_pretrained(tmp_path)
    if target == "16bit":
        reloaded = AUTO.from_pretrained(tmp_path)
        assert not hasattr(reloaded.config, "quantization_config")
        torch.testing.assert_close(logits(reloaded), logits(merged), rtol=1e-4, atol=1e-5)
    else:
        assert_same_model(load_model(tmp_path, torch.float32), merged)


def test_weight_misread_by_bitsandbytes_saved_in_own_format(tmp_path):
    """Its CPU code takes the blocks of 96 columns for those of rows; the folder is not given to it."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    qk.replace_linear(model)
    model.save_pretrained(tmp_path)
    assert written_config(tmp_path)["quant_method"] == "qlora_kernels"
    for again in (AUTO.from_pretrained(tmp_path).eval(), load_model(tmp_path, torch.float32)):
        assert_same_model(again, model)


def head_model(kind):
    """A tiny model of a family other than the causal ones, and its inputs."""
    torch.manual_seed(0)
    ids = {"input_ids": torch.arange(1, 9)[None]}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    if kind == "falcon":
        del sizes["intermediate_size"]
        config = transformers.FalconConfig(**sizes, vocab_size=48, bos_token_id=1, eos_token_id=2)
        return transformers.FalconForCausalLM(config).eval(), ids
    if kind == "mamba":
        mamba = transformers.MambaConfig(hidden_size=64, num_hidden_layers=1, state_size=8, vocab_size=32)
        return transformers.MambaForCausalLM(mamba).eval(), ids
    if kind == "distilbert":
        distilbert = transformers.DistilBertConfig(vocab_size=48, dim=64, n_layers=1, n_heads=4, hidden_dim=64)
        return transformers.DistilBertForSequenceClassification(distilbert).eval(), ids
    if kind == "t5":
        t5 = transformers.T5Config(vocab_size=48, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
        t5.decoder_start_token_id = 0
        return transformers.T5ForConditionalGeneration(t5).eval(), {**ids, "decoder_input_ids": ids["input_ids"]}
    if kind == "siglip":
        siglip = transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4)
        return transformers.SiglipVisionModel(siglip).eval(), {"pixel_values": torch.randn(1, 3, 8, 8)}
    if kind == "wav2vec2":
        wav2vec2 = transformers.Wav2Vec2Config(
            **sizes, vocab_size=32, conv_dim=(16,), conv_kernel=(4,), conv_stride=(4,), num_feat_extract_layers=1
        )
        wav2vec2.update({"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2})
        return transformers.Wav2Vec2ForCTC(wav2vec2).eval(), {"input_values": torch.randn(1, 64)}
    name = {"bert": "Bert", "roberta": "Roberta"}[kind]
    config = getattr(transformers, f"{name}Config")(**sizes, vocab_size=48, num_labels=3)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval(), ids


@torch.no_grad()
def first_output(model, inputs):
    return model(**inputs).to_tuple()[0]


@pytest.mark.parametrize("kind", ["falcon", "t5", "siglip", "wav2vec2", "mamba", "distilbert"])
def test_layers_that_would_be_wrong_in_bitsandbytes_are_saved_in_own_format(kind, tmp_path):
    """Subclasses of nn.Linear, layers that the model keeps in float32, weights that it reads, and a layer whose name
    ends like that of a dense one.
    """
    model, inputs = head_model(kind)
    qk.replace_linear(model, skip=("classifier",) if kind == "distilbert" else ("lm_head",))
    model.save_pretrained(tmp_path)
    assert written_config(tmp_path)["quant_method"] == "qlora_kernels"
    again = type(model).from_pretrained(tmp_path).eval()
    assert of_type(again, qk.LinearNF4) == of_type(model, qk.LinearNF4)
    # The dense layers' sums depend on the alignment of tensors.
    torch.testing.assert_close(first_output(again, inputs), first_output(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "dense"), [("bert", ["classifier"]), ("roberta", ["dense", "out_proj"])])
def test_heads_of_classifiers_stay_dense(kind, dense, tmp_path):
    """So that they train: PEFT's task types train a copy of the head."""
    plain, inputs = head_model(kind)
    plain.save_pretrained(tmp_path / "dense")
    model = type(plain).from_pretrained(tmp_path / "dense", quantization_config=QLoRAKernelsConfig()).eval()
    assert [name.rpartition(".")[2] for name in of_type(model, nn.Linear)] == dense
    model.save_pretrained(tmp_path / "nf4")
    again = type(plain).from_pretrained(tmp_path / "nf4").eval()
    # The dense layers' sums depend on the alignment of tensors.
    torch.testing.assert_close(first_output(again, inputs), first_output(model, inputs), rtol=1e-4, atol=1e-5)
    adapted = qk.peft.get_peft_model(again, qk.peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert sum("classifier" in name for name, p in adapted.named_parameters() if p.requires_grad) == 2 * len(dense)


def test_weight_without_its_constants_raises(dense, tmp_path):
    load(dense("llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "q_proj.weight." not in n}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AUTO.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_model_quantized_in_place_saves_and_loads_here(kind, tmp_path):
    """`make compat` runs this with the oldest transformers, too."""
    model = build(kind)
    qk.replace_linear(model)
    model.save_pretrained(tmp_path)
    assert_same_model(load_model(tmp_path, torch.float32), model)


def test_from_pretrained_names_the_transformers_it_needs(dense, monkeypatch):
    monkeypatch.setattr(quantizer, "transformers_version", "5.9.1")
    with pytest.raises(ImportError, match=r"transformers must be at least 5\.22 for from_pretrained, got 5\.9\.1"):
        load(dense("llama"))


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"load_in_4bit": True}, "load_in_4bit is not an argument; leave it out"),
        ({"bnb_4bit_compute_dtype": torch.bfloat16}, "bnb_4bit_compute_dtype is not an argument; use compute_dtype"),
        ({"skip": ["lm_head"]}, "skip is not an argument; the arguments are skip_modules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_bitsandbytes_get_advice(options, advice):
    with pytest.raises(TypeError, match=f"QLoRAKernelsConfig: {advice}"):
        QLoRAKernelsConfig(**options)
