"""Tokenizers, chat templates and names in GGUF files, read back by the gguf package and by transformers."""

from __future__ import annotations

import copy
import json
import warnings

import gguf
import pytest
import transformers
from tokenizers import Tokenizer

from qlora_kernels.integrations.gguf_export import write_model_gguf
from qlora_kernels.integrations.model_folders import ModelError
from tests.support.tiny_tokenizers import TEXT, tiny_tokenizer

from .gguf_files import fields, random_model


@pytest.mark.filterwarnings("ignore:.*puts a space before a text")
@pytest.mark.parametrize("family", ["gpt2", "llama2", "mistral"])
def test_tokenizer_reads_back(tmp_path, family):
    tokenizer = copy.copy(tiny_tokenizer(family))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    values = fields(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert values["tokenizer.ggml.add_bos_token"] == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    kinds = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<|im_end|>"] == gguf.TokenType.CONTROL
    if family == "gpt2":
        assert values["tokenizer.ggml.pre"] == "gpt-2"
        for text in TEXT:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    else:
        assert kinds["<0x0A>"] == gguf.TokenType.BYTE


@pytest.mark.parametrize(("family", "words"), [("unigram", "must be of type BPE"), ("python", "must be a fast one")])
def test_tokenizers_that_are_refused(tmp_path, family, words):
    tokenizer = tiny_tokenizer(family)
    with pytest.raises(ModelError, match=words):
        write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)


def test_another_way_to_split_a_text_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    tokenizer = copy.deepcopy(tiny_tokenizer("gpt2"))
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    with pytest.raises(ModelError, match="must split texts as GPT-2, Llama 3, Qwen 2 or SmolLM do"):
        write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)


def test_other_whitespace_is_reported(tmp_path):
    model = random_model("llama", tiny_tokenizer("llama2"))
    for family, words in (("llama2", "at the beginning of a text"), ("mistral", "after special tokens")):
        with pytest.warns(UserWarning, match=f"this tokenizer puts one .*{words}"):
            write_model_gguf(tmp_path / family, model, tiny_tokenizer(family))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("llama2-legacy", "gemma"):
            write_model_gguf(tmp_path / family, model, tiny_tokenizer(family))


def test_tokens_without_merge_are_refused(tmp_path):
    """llama.cpp makes such a word one token for Llama 3 and several for the others."""
    tokenizer = copy.deepcopy(tiny_tokenizer("gpt2"))
    model = random_model("llama", tokenizer)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["merges"].pop()
    for ignore_merges in (False, True):
        description["model"]["ignore_merges"] = ignore_merges
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(description))
        if ignore_merges:
            with pytest.raises(
                ModelError, match="ignore_merges must be False in a tokenizer that splits as gpt-2 does"
            ):
                write_model_gguf(tmp_path / "m.gguf", model, tokenizer)
        else:
            write_model_gguf(tmp_path / "m.gguf", model, tokenizer)
    description["model"]["end_of_word_suffix"] = "</w>"
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(description))
    with pytest.raises(ModelError, match="must have no end_of_word_suffix, got '</w>'"):
        write_model_gguf(tmp_path / "m.gguf", model, tokenizer)


def test_chat_templates_by_name(tmp_path):
    tokenizer = copy.copy(tiny_tokenizer("gpt2"))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)
    values = fields(tmp_path / "m.gguf")
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    assert values["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_a_model_without_a_name_in_gguf_is_refused(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=400))
    with pytest.raises(ModelError, match="the model must be one of llama, mistral, qwen2, qwen3, got gpt2"):
        write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"))
