"""Prompt-type adapters compared with PEFT: equal weights give equal outputs, and files load in both directions."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels import peft
from qlora_kernels.io import peft_checkpoint
from qlora_kernels.peft import PeftModel, get_peft_model
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
N = 4


def theirs_logits(model, kind, inputs, shift):
    """Drop the logits of virtual positions, which PEFT returns too."""
    y = model(**inputs).logits
    return y[:, shift:] if kind in ("llama", "gpt2") else y


def cross(hf_peft, tmp_path, kind, ours_config, theirs_config, shift):
    """Check files from here to PEFT and back, then from PEFT to here, each with other weights."""
    inputs = batch(kind)
    ours = get_peft_model(make(kind), ours_config).eval()
    randomize(ours)
    expected = logits(ours, inputs)
    ours.save_pretrained(tmp_path / "ours")
    theirs = hf_peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours").eval()
    assert_same_function(theirs_logits(theirs, kind, inputs, shift), expected)
    labelled = {**inputs, "labels": inputs["input_ids"][:, 0] % 2 if kind == "bert" else inputs["input_ids"]}
    labelled.pop("decoder_input_ids", None)
    assert_same_function(theirs(**labelled).loss, ours(**labelled).loss)
    theirs = hf_peft.get_peft_model(make(kind), theirs_config).eval()
    randomize(theirs, seed=4)
    expected = theirs_logits(theirs, kind, inputs, shift)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(make(kind), tmp_path / "theirs").eval()
    assert_same_function(logits(again, inputs), expected)


@pytest.mark.parametrize("kind", TASKS)
def test_prompt_tuning(hf_peft, tmp_path, kind):
    options = {"task_type": TASKS[kind], "num_virtual_tokens": N}
    theirs = hf_peft.PromptTuningConfig(**options)
    cross(hf_peft, tmp_path, kind, peft.PromptTuningConfig(**options), theirs, N)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize("kind", TASKS)
def test_p_tuning(hf_peft, tmp_path, kind, encoder):
    options = {
        "task_type": TASKS[kind],
        "num_virtual_tokens": N,
        "encoder_reparameterization_type": encoder,
        "encoder_hidden_size": 16,
    }
    theirs = hf_peft.PromptEncoderConfig(**options)
    cross(hf_peft, tmp_path, kind, peft.PTuningConfig(**options), theirs, N)


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_prefix_tuning(hf_peft, tmp_path, kind, projection):
    """llama has fewer key heads than query heads. PEFT refuses a prefix for BERT's classifiers."""
    options = {"task_type": TASKS[kind], "num_virtual_tokens": N, "prefix_projection": projection}
    sites = {"sites": ["decoder"], "peft_layers": True} if kind == "t5" else {}
    theirs = hf_peft.PrefixTuningConfig(**options, encoder_hidden_size=16)
    ours = peft.PrefixTuningConfig(**options, encoder_hidden_size=16, **sites)
    cross(hf_peft, tmp_path, kind, ours, theirs, 0)


def test_p_tuning_v2_is_a_flat_prefix(hf_peft, tmp_path):
    theirs = hf_peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    ours = peft.PTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=N)
    cross(hf_peft, tmp_path, "llama", ours, theirs, 0)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("t5", peft.PrefixTuningConfig(num_virtual_tokens=N)),
        ("t5", peft.PrefixTuningConfig(num_virtual_tokens=N, sites=["decoder"])),
        ("llama", peft.PTuningV2Config(num_virtual_tokens=N, position_offset=False)),
        ("llama", peft.PromptTuningConfig(num_virtual_tokens=N, placeholder_token_id=3)),
        ("bert", peft.AdapterConfig(bottleneck_size=4)),
        ("bert", peft.BitFitConfig()),
        ("llama", peft.MAMConfig(prefix_length=N, bottleneck_size=4)),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_adapters_incompatible_with_peft_cannot_load_there(hf_peft, tmp_path, kind, config):
    get_peft_model(make(kind), config).save_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError)):
        hf_peft.PeftModel.from_pretrained(make(kind), tmp_path)
    PeftModel.from_pretrained(make(kind), tmp_path)


def test_encoder_weights_equal_peft(hf_peft):
    """Equal weights in both P-tuning encoders give equal prompts."""
    from peft.tuners.p_tuning.model import PromptEncoder

    for kind in ("MLP", "LSTM"):
        options = {"num_virtual_tokens": N, "encoder_reparameterization_type": kind, "encoder_hidden_size": 16}
        ours = get_peft_model(make("llama"), peft.PTuningConfig(**options)).injector.adapters["default"][0]
        config = hf_peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", token_dim=32, num_transformer_submodules=1, **options
        )
        theirs = PromptEncoder(config)
        state = ours.module.state_dict()
        renamed = {k.replace("mlp.", "mlp_head.").replace("lstm.", "lstm_head."): v for k, v in state.items()}
        theirs.load_state_dict(renamed)
        assert_same_function(theirs(torch.arange(N)[None])[0], ours.prompt())


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_save_replaces_previous_adapter_completely(tmp_path):
    """Neither the sidecar's tensors nor a complete adapter in a folder of a combination are left; other files are
    kept."""
    (tmp_path / "README.md").write_text("mine")
    tuned = peft.PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=16)
    get_peft_model(make("llama"), tuned).save_pretrained(tmp_path)
    assert "qlora_kernels.safetensors" in names_in(tmp_path)
    lora = peft.LoraConfig(target_modules=["q_proj"])
    get_peft_model(make("llama"), lora).save_pretrained(tmp_path)
    single = {"adapter_config.json", "adapter_model.safetensors", "qlora_kernels.json", "README.md"}
    assert names_in(tmp_path) == single
    get_peft_model(make("llama"), [lora, peft.BitFitConfig(add_missing=True)]).save_pretrained(tmp_path)
    assert {name for name in names_in(tmp_path) if "/" not in name} == {"qlora_kernels.json", "README.md"}
    assert len(PeftModel.from_pretrained(make("llama"), tmp_path).peft_config["default"]) == 2


def test_failed_save_keeps_previous_adapter(tmp_path, monkeypatch):
    model = get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    randomize(model)

    def full_disk(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("qlora_kernels.io.peft_checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before


def test_a_damaged_file_is_named(tmp_path):
    """Files that are cut short or have a changed bit are refused; a changed configuration gives a warning."""
    model = get_peft_model(make("llama"), peft.PTuningConfig(num_virtual_tokens=N, encoder_hidden_size=16))
    model.save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "qlora_kernels.safetensors"):
        whole = (tmp_path / name).read_bytes()
        middle = len(whole) - 30
        flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        for content in (b"", whole[:7], whole[:100], whole[:-1], flipped):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=name):
                PeftModel.from_pretrained(make("llama"), tmp_path)
        (tmp_path / name).write_bytes(whole)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"revision": null', '"revision": "x"'))
    with pytest.warns(UserWarning, match=r"adapter_config\.json differs from the file that was saved"):
        PeftModel.from_pretrained(make("llama"), tmp_path)
    for text in ("[1]", "{", "[" * 100_000, config.replace("null", "NaN"), config.replace("null", "1e999")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json: "), pytest.warns(UserWarning, match="as it is"):
            PeftModel.from_pretrained(make("llama"), tmp_path)


def test_error_names_tensor_with_nonfinite_values(tmp_path):
    model = get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .*lora_B.* must be finite"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


def test_several_adapters_are_saved_as_one(tmp_path, monkeypatch):
    """Adapters that belong together, such as a fusion and its parts, are always of one save."""
    model = get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", peft.LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    assert {"adapter_config.json", "second/adapter_config.json"} <= before.keys()
    randomize(model)
    calls, save_file = [], peft_checkpoint.save_file

    def full_disk_later(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError("no space left")
        return save_file(*arguments, **options)

    monkeypatch.setattr(peft_checkpoint, "save_file", full_disk_later)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before


def test_files_name_the_base_model(hf_peft, tmp_path):
    """Programs that are given the adapter alone load the base from the folder that adapter_config.json names."""
    transformers = pytest.importorskip("transformers")
    make("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = hf_peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_same_function(logits(theirs, batch("llama")), logits(model, batch("llama")))
