"""From files to windows: what is learned, what stays unseen, and what is refused with which words."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.training import Chat, Completion, DataError, Plain, encode, language_reference, read_corpus
from qlora_kernels.training.batches import BatchOrder, collate
from qlora_kernels.training.windows import IGNORED, Example
from tests.support.tiny_model import write_jsonl, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def learned(example: Example, tokenizer) -> str:
    return tokenizer.decode(example.input_ids[example.labels != IGNORED])


def test_jsonl_kinds_and_split(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records = [{"text": str(i)} for i in range(8)] + [{"prompt": "p", "completion": "c"}, {"messages": chat}]
    corpus = read_corpus(write_jsonl(tmp_path / "data.jsonl", records), unseen_fraction=0.2)
    assert corpus.unseen == (Plain("4"), Chat(tuple(chat)))
    assert corpus.train[-1] == Completion("p", "c")
    assert len(corpus.train) == 8


def test_text_is_cut_between_paragraphs(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("a b c d\n\n" * 50)
    corpus = read_corpus(path, unseen_fraction=0.1)
    assert "\n\n".join([corpus.train[0].text, corpus.unseen[0].text]) == path.read_text().strip()
    assert corpus.unseen[0].text.startswith("a b c d\n\n")
    assert 0.05 < len(corpus.unseen[0].text) / len(path.read_text()) < 0.15


def test_language_reference():
    corpus = language_reference()
    assert len(corpus.train) > 6 * len(corpus.unseen) > 0
    assert not set(corpus.train) & set(corpus.unseen)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3: must be JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', r'a\.jsonl:2: must hold \{"text"\}'),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: must hold"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: must hold"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: messages must be a list"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "a turn of the assistant"),
        ("a.jsonl", b'{"text": "x"}\n', "at least 2 records"),
        ("a.jsonl", b" \n", "empty file"),
        ("a.txt", b"", "empty file"),
        ("a.txt", b"word", "long enough to keep a part unseen"),
        ("a.txt", b"\xff\xfe", "must be UTF-8 text, got byte 0xff"),
    ],
)
def test_refusals(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_corpus(path, unseen_fraction=0.1)


def test_plain_texts_are_packed_with_an_end_between(tokenizer):
    examples = encode("x", [Plain("abc"), Plain("defgh")], tokenizer, seq_len=4)
    assert [tokenizer.decode(e.input_ids) for e in examples] == ["abc<eos>", "defg"]
    assert all(torch.equal(e.input_ids, e.labels) for e in examples)
    with pytest.raises(DataError, match="must fill a window of 10 tokens, got 9"):
        encode("x", [Plain("abc"), Plain("defgh")], tokenizer, seq_len=10)


def test_only_completions_are_learned(tokenizer):
    [example] = encode("x", [Completion("2+2=", "4")], tokenizer, seq_len=16)
    assert tokenizer.decode(example.input_ids) == "2+2=4<eos>"
    assert learned(example, tokenizer) == "4<eos>"
    with pytest.raises(DataError, match="a completion that begins within 4 tokens"):
        encode("x", [Completion("2+2=", "4")], tokenizer, seq_len=4)


def test_only_the_assistants_turns_are_learned(tokenizer):
    turns = ["user", "hi", "assistant", "yo", "user", "bye", "assistant", "ciao"]
    messages = tuple({"role": r, "content": c} for r, c in zip(turns[::2], turns[1::2], strict=True))
    [example] = encode("x", [Chat(messages)], tokenizer, seq_len=256)
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole
    assert learned(example, tokenizer) == "yo\nciao\n"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    before, tokenizer.chat_template = tokenizer.chat_template, template
    messages = ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"})
    try:
        with pytest.raises(DataError, match="chat template must only append"):
            encode("x", [Chat(messages)], tokenizer, seq_len=64)
    finally:
        tokenizer.chat_template = before


def test_collate_pads_on_the_right():
    examples = [
        Example(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])),
        Example(torch.tensor([4]), torch.tensor([4])),
    ]
    batch = collate(examples, pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.labels.tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert batch.attention_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.learned_tokens == 2
    assert collate(examples[:1]).attention_mask is None


def test_order_is_a_function_of_seed_and_step():
    order = BatchOrder(10, 4, seed=3)
    steps = [order.indices(step) for step in range(5)]
    assert [BatchOrder(10, 4, seed=3).indices(step) for step in reversed(range(5))] == steps[::-1]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert BatchOrder(10, 4, seed=4).indices(0) != steps[0]
