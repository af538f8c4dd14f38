"""Trained rows for some tokens: ties, tables, and errors; test_peft_types.py compares outputs and files with PEFT's."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import qlora_kernels as qk
from qlora_kernels import peft
from qlora_kernels.peft import PeftModel, get_peft_model
from tests.peft.adapter_pairs import assert_rows_use_their_adapters
from tests.peft.models import batch, llama, logits, make, randomize
from tests.support.tolerances import assert_same_function


def tied_llama():
    torch.manual_seed(0)
    model = llama(layers=1).eval()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


CONFIGS = {
    "type": ("TrainableTokensConfig", {"token_indices": [24, 12]}),
    "lora": ("LoraConfig", {"r": 2, "trainable_token_indices": [24, 12]}),
    "same": ("LoraConfig", {"r": 2, "trainable_token_indices": {"lm_head": [12], "embed_tokens": [12]}}),
    "other": ("LoraConfig", {"r": 2, "trainable_token_indices": {"lm_head": [3], "embed_tokens": [12]}}),
    "head": ("LoraConfig", {"r": 2, "trainable_token_indices": {"lm_head": [3]}}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_ties_are_pefts(hf_peft, tmp_path, case):
    """What is tied to an embedding has its rows, once, unless it has tokens of its own; a merge keeps the tie."""
    name, options = CONFIGS[case]
    inputs = batch("llama")
    theirs = hf_peft.get_peft_model(tied_llama(), getattr(hf_peft, name)(**options)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(tied_llama(), tmp_path / "theirs", is_trainable=True).eval()
    trained = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (ours, theirs)]
    assert trained[0] == trained[1]
    with torch.no_grad():
        y = logits(theirs, inputs)
        assert_same_function(logits(ours, inputs), y)
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    merged = ours.merge_and_unload()
    if case not in ("other", "head"):
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        assert_same_function(logits(merged, inputs), y)


def test_a_bias_of_the_head_and_an_nf4_head_stay():
    """PEFT drops the bias of a head whose rows train."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(32, 48))
    qk.replace_linear(head, skip=())
    x = torch.randn(3, 32)
    for layer in (torch.nn.Sequential(torch.nn.Linear(32, 48)), head):
        base = layer(x)
        model = get_peft_model(layer, peft.TrainableTokensConfig(token_indices=[5, 2], target_modules=["0"]))
        assert_same_function(model(x), base)
        randomize(model)
        y = model(x)
        others = [n for n in range(48) if n not in (5, 2)]
        assert_same_function(y[:, others], base[:, others])
        assert (y[:, [2, 5]] - base[:, [2, 5]]).abs().min() > 1e-4
        assert_same_function(model.merge_and_unload()(x), y)


def test_the_padding_token_gets_no_gradient():
    model = get_peft_model(make("llama", layers=1), peft.TrainableTokensConfig(token_indices=[7, 0, 3]))
    ids = torch.tensor([[0, 3, 7, 3]])
    model(input_ids=ids).logits.square().sum().backward()
    (rows,) = (p for p in model.parameters() if p.requires_grad)
    assert (rows.grad.abs().sum(1) > 0).tolist() == [True, False, True]


def test_token_rows_of_several_adapters_in_one_batch():
    model = get_peft_model(make("llama", layers=1), peft.TrainableTokensConfig(token_indices=[12, 27])).eval()
    randomize(model)
    model.add_adapter("lora", peft.LoraConfig(r=2, trainable_token_indices=[12, 6]))
    model.set_adapter("lora")
    randomize(model, seed=3)
    with torch.no_grad():
        assert_rows_use_their_adapters(model, batch("llama"), ["default", "__base__", "lora"])


LORA = "trainable_token_indices"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.TrainableTokensConfig(token_indices=[48]), r"token_indices: every token must lie in \[0, 48\)"),
        (peft.TrainableTokensConfig(token_indices=[-1]), r"token_indices: every token must lie in \[0, 48\)"),
        (
            peft.TrainableTokensConfig(token_indices=[]),
            "token_indices: the tokens of model.embed_tokens must be one or",
        ),
        (
            peft.TrainableTokensConfig(token_indices=[1, 1]),
            "token_indices: the tokens of model.embed_tokens must be one",
        ),
        (
            peft.TrainableTokensConfig(token_indices=[1], target_modules=["emb"]),
            "target_modules: every name must match",
        ),
        (peft.LoraConfig(trainable_token_indices={"emb": [1]}), f"{LORA}: every name must match"),
        (
            peft.LoraConfig(trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
            f"{LORA}: model.embed_tokens must not be in modules_to_save too",
        ),
        (
            peft.LoraConfig(trainable_token_indices=[1], target_modules=["embed_tokens", "q_proj"]),
            f"{LORA}: model.embed_tokens must not be in target_modules too",
        ),
    ],
    ids=lambda value: value.peft_type if hasattr(value, "peft_type") else "",
)
def test_error_names_invalid_configuration(config, message):
    base = make("llama", layers=1)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names, "nothing is left in the model"


def test_further_refusals():
    with pytest.raises(ValueError, match="TrainableTokensConfig: modules_to_save must be None"):
        peft.TrainableTokensConfig(token_indices=[1], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="target_modules: must name the embedding of a TorchTransformer"):
        get_peft_model(make("torch"), peft.TrainableTokensConfig(token_indices=[1]))
    tokens = {"lm_head": [3], "embed_tokens": [12]}
    with pytest.raises(ValueError, match=f"{LORA}: layers that share a weight must have the same tokens"):
        get_peft_model(tied_llama(), peft.LoraConfig(trainable_token_indices=tokens, ensure_weight_tying=True))
    model = get_peft_model(make("llama", layers=1), peft.LoraConfig(trainable_token_indices=[3]))
    with pytest.raises(ValueError, match=rf"add_weighted_adapter: adapter 'default' must not have {LORA}=\[3\]"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_files_with_other_tokens_are_refused(tmp_path):
    get_peft_model(make("llama"), peft.TrainableTokensConfig(token_indices=[1, 2])).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "token_indices": [1, 2, 3]}))
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match="of another shape"):
        PeftModel.from_pretrained(make("llama"), tmp_path)
