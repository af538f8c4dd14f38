"""Merging of adapters into the weights, and what is undone by unmerging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, get_peft_model
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function

from .adapter_pairs import FORMATS, two_adapters


@FORMATS
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_merge_and_unmerge(nf4, options):
    inputs = batch("llama")
    model = get_peft_model(make("llama", nf4=nf4), LoraConfig(target_modules="all-linear", **options)).eval()
    randomize(model)
    before, state = logits(model, inputs), {k: v.clone() for k, v in model.base_model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert_same_function(logits(model, inputs), before)
    model.unmerge_adapter()
    assert_same_function(logits(model, inputs), before)
    after = model.base_model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


@pytest.mark.parametrize(
    ("target", "nf4", "layer"),
    [
        ("16bit", True, nn.Linear),
        ("16bit", False, nn.Linear),
        ("nf4", True, qk.LinearNF4),
        ("nf4", False, qk.LinearNF4),
        ("same", True, qk.LinearNF4),
        ("same", False, nn.Linear),
    ],
)
@pytest.mark.filterwarnings("ignore:merge")
def test_merge_and_unload(target, nf4, layer):
    model, inputs = two_adapters(nf4), batch("llama")
    before = logits(model, inputs)
    base = model.merge_and_unload(target)
    assert type(base.model.layers[0].self_attn.q_proj) is layer
    if layer is nn.Linear:
        assert_same_function(logits(base, inputs), before)
    assert not any(p.requires_grad for p in base.parameters())


def test_requantized_merge_reports_error():
    model = two_adapters(nf4=True)
    with pytest.warns(UserWarning, match=r"\|error\|/\|update\| = \d"):
        model.merge_adapter(target="nf4")


def test_safe_merge_refuses_infinities():
    model = two_adapters()
    next(model.adapters["default"].parameters()).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="must be finite"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.filterwarnings("ignore:merge")
def tied_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()


def test_tied_head_is_merged_once():
    base = tied_llama()
    embedding = base.model.embed_tokens.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(target_modules=["lm_head"])).eval()
    randomize(model)
    before = logits(model, batch("llama"))
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, embedding)
    assert not merged.config.tie_word_embeddings
    assert_same_function(logits(merged, batch("llama")), before)


@pytest.mark.parametrize("alphas", [{}, {"lm_head": 24}], ids=["one update", "another scaling"])
def test_merged_layers_stay_tied_only_with_one_update(alphas):
    """An embedding and its head share the factors; with another alpha, the head's merged weight is another one."""
    targets = ["embed_tokens", "lm_head"]
    config = LoraConfig(target_modules=targets, ensure_weight_tying=True, alpha_pattern=alphas)
    model = get_peft_model(tied_llama(), config).eval()
    randomize(model)
    before = logits(model, batch("llama"))
    merged = model.merge_and_unload()
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (not alphas)
    assert_same_function(logits(merged, batch("llama")), before)


@pytest.mark.parametrize("quantized_first", [False, True])
def test_merged_gpt2_has_conv1d_layers(tmp_path, quantized_first):
    """GPT-2's layers store their weights transposed, also after a conversion to NF4 and back."""
    from transformers import GPT2LMHeadModel

    base = make("gpt2")
    qk.replace_linear(base)
    inputs, config = batch("gpt2"), LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(base, config)
    randomize(model)
    if quantized_first:
        with pytest.warns(UserWarning, match="quantizing again"):
            base = model.merge_and_unload("same")
        model = get_peft_model(base, config)
    model.eval()
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    assert_same_function(logits(merged, inputs), expected)
    merged.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_same_function(logits(again, inputs), expected)


@FORMATS
def test_set_adapter_unmerges_others(nf4):
    """Merged layers would go on computing with the adapters that are merged into them."""
    model, inputs = two_adapters(nf4), batch("llama")
    both = list(model.adapters)
    model.set_adapter(both)
    expected = logits(model, inputs)
    model.set_adapter(both[0])
    first = logits(model, inputs)
    model.merge_adapter()
    model.set_adapter(both[0])  # the merged one: it stays merged
    assert "merged" in str(model.explain())
    with pytest.raises(ValueError, match=f"load_adapter: '{both[0]}' must not be merged"):
        model.load_adapter("unread", both[0])
    with pytest.warns(UserWarning, match=rf"set_adapter: \['{both[0]}'\] were merged"):
        model.set_adapter(both)
    assert_same_function(logits(model, inputs), expected)
    model.set_adapter(both[0])
    assert_same_function(logits(model, inputs), first)
