"""Ids equal the tokenizer's for the whole text, with one beginning of text; labels follow the characters."""

from __future__ import annotations

import copy

import pytest

from qlora_kernels.training import Completion, Plain, TextTokens, encode, encode_rows
from qlora_kernels.training.windows import IGNORED
from tests.support.tiny_tokenizers import FAMILIES, tiny_tokenizer

BYTE_LEVEL = ["gpt2", "qwen", "llama3", "opt", "bos-and-eos"]
BEGINS = {"llama3": "<s>", "byte-level-trimmed": "<s>", "bos-and-eos": "<s>", "opt": "</s>", "python-bos": "<s>"}
BEGINS |= dict.fromkeys(["llama2", "llama2-legacy", "mistral", "gemma"], "<s>")

PAIRS = [
    ("What is the answer?", " yes"),
    ("What is the answer? ", "yes"),
    ("What is the answer?\n", "the answer is no."),
    ("user: hello there\nassistant:", " hello to you too"),
    ("the quick bro", "wn fox"),
    ("it is ", "é 🙂"),
    ("", "hello"),
    ("What", ""),
]


def tokens(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def learned(example) -> list[int]:
    return example.input_ids[example.labels != IGNORED].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_completion_is_tokenized_as_one_text(family, prompt, completion):
    tokenizer = tiny_tokenizer(family)
    [example] = encode("x", [Completion(prompt, completion)], tokenizer, 200)
    whole = tokenizer(prompt + completion)["input_ids"]
    end = tokenizer.eos_token_id
    assert example.input_ids.tolist() == whole + ([] if whole[-1] == end else [end])
    ids = learned(example)
    assert example.labels.tolist()[-len(ids) :] == ids
    assert ids[-1] == end
    spoken = tokenizer.decode(ids[:-1])
    assert spoken.strip().endswith(completion.strip()) or tokenizer.unk_token_id in ids


@pytest.mark.parametrize("family", FAMILIES)
def test_one_beginning_of_text(family):
    tokenizer = tiny_tokenizer(family)
    texts = TextTokens(tokenizer)
    begin = BEGINS.get(family)
    assert tokens(tokenizer, texts.before) == ([begin] if begin else [])
    ids = texts.ids("the answer is yes")
    assert ids == [i for i in tokenizer("the answer is yes")["input_ids"] if family != "bos-and-eos" or i != 1]
    assert texts.ids("") == texts.before
    if begin:
        written = texts.ids(f"{begin}the answer is yes")
        assert written.count(texts.before[0]) == 1
        assert written == tokenizer(f"{begin}the answer is yes", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_alone_begins_the_example(family):
    """If the prompt ends at a token's end, generation gets the tokens of training."""
    tokenizer = tiny_tokenizer(family)
    prompt, completion = "user: hello there\nassistant:", " hello to you too"
    encoding = encode_rows("x", [Completion(prompt, completion)], tokenizer, 200)
    if encoding.rows.straddling == 0:
        ids = TextTokens(tokenizer).ids(prompt)
        [example] = encoding.examples
        assert example.input_ids[: len(ids)].tolist() == ids
        assert example.labels[: len(ids)].tolist() == [IGNORED] * len(ids)
        assert IGNORED not in example.labels[len(ids) :].tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama3", "llama2-legacy", "python"])
def test_token_across_prompt_boundary_is_learned_and_counted(family):
    tokenizer = tiny_tokenizer(family)
    # "Ġyes" or "▁yes" includes the prompt's last space.
    encoding = encode_rows("x", [Completion("the answer is ", "yes"), Completion("yes", "\nno")], tokenizer, 200)
    assert encoding.rows.straddling == 1
    assert "prompts that end inside a token: 1" in str(encoding.rows)
    first = tokens(tokenizer, learned(encoding.examples[0]))
    assert "yes" in "".join(first)
    assert "".join(first).removesuffix("</s>")[0] in "Ġ▁"
    assert "answer" not in "".join(first[1:])


@pytest.mark.parametrize("family", BYTE_LEVEL)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS[:5])
def test_tokens_with_completion_characters_are_learned(family, prompt, completion):
    """Token k is learned if and only if the text of tokens 0..k is longer than the prompt."""
    tokenizer = tiny_tokenizer(family)
    [example] = encode("x", [Completion(prompt, completion)], tokenizer, 200)
    begin = len(TextTokens(tokenizer).before)
    body = example.input_ids.tolist()[begin:-1]
    reaches = [len(tokenizer.decode(body[: k + 1])) > len(prompt) for k in range(len(body))]
    assert [label != IGNORED for label in example.labels.tolist()[begin:-1]] == reaches


def test_offsets_and_prefixes_agree():
    """Without offsets, the learned tokens are found by tokenizing prefixes of the text."""
    for family in [f for f in FAMILIES if "python" not in f]:
        slow = copy.copy(TextTokens(tiny_tokenizer(family)))
        slow.has_offsets = False
        for prompt, completion in PAIRS[:5]:
            text = prompt + completion
            spans = [(len(prompt), len(text))]
            fast = TextTokens(tiny_tokenizer(family)).marked(text, spans)
            by_prefix = slow.marked(text, spans)
            assert by_prefix.ids == fast.ids
            # Tokens before the boundary that the completion changed count as learned, so that never fewer are learned.
            assert all(mark or not other for mark, other in zip(by_prefix.learned, fast.learned, strict=True))
            assert by_prefix.learned == fast.learned or by_prefix.straddling


@pytest.mark.parametrize("family", ["llama3", "python-bos"])
def test_several_spans(family):
    tokenizer = tiny_tokenizer(family)
    text = "the answer is yes\nthe answer is no."
    spans = [(text.index(" is"), text.index("\n")), (text.rindex(" is"), len(text))]
    marked = TextTokens(tokenizer).marked(text, spans)
    spoken = [token for token, mark in zip(tokens(tokenizer, marked.ids), marked.learned, strict=True) if mark]
    expected = {"llama3": "Ġis Ġyes Ġis Ġno .", "python-bos": "▁is ▁yes ▁is ▁ n o ."}
    assert spoken == expected[family].split(" ")
    assert marked.straddling == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_running_text(family):
    """Documents are complete, each after a beginning, with an end between them; each window has a beginning."""
    tokenizer = tiny_tokenizer(family)
    texts = ["the quick brown fox jumps over the lazy dog.", "What is the answer?", "hello there"] * 3
    ids = [TextTokens(tokenizer).ids(text) for text in texts]
    begin = TextTokens(tokenizer).before
    seq_len = 11
    windows = [example.input_ids.tolist() for example in encode("x", [Plain(t) for t in texts], tokenizer, seq_len)]
    assert all(len(window) == seq_len and window[: len(begin)] == begin for window in windows)
    stream = ids[0] + [i for document in ids[1:] for i in [tokenizer.eos_token_id, *document]]
    for window in windows:
        fresh = window if stream[: len(begin)] == begin else window[len(begin) :]
        assert stream[: len(fresh)] == fresh
        stream = stream[len(fresh) :]
    assert len(stream) < seq_len


def test_minimal_tokenizer():
    """A tokenizer outside transformers, with only the protocol's three names."""

    class Letters:
        eos_token_id = 0

        def __call__(self, text, *, add_special_tokens):
            return {"input_ids": [ord(letter) for letter in text]}

        def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
            raise NotImplementedError

    [example] = encode("x", [Completion("ab", "cd")], Letters(), 8)
    assert example.input_ids.tolist() == [97, 98, 99, 100, 0]
    assert example.labels.tolist() == [IGNORED, IGNORED, 99, 100, 0]
