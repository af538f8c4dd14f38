"""From records to windows of tokens with labels, and from those to batches."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.training import Chat, Completion, DataError, Plain, RowCounts, encode, encode_rows
from qlora_kernels.training.batches import BatchOrder, collate
from qlora_kernels.training.windows import IGNORED, Example
from tests.support.tiny_model import write_tokenizer
from tests.support.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def learned(example: Example, tokenizer) -> str:
    return tokenizer.decode(example.input_ids[example.labels != IGNORED])


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


def test_template_rewriting_earlier_turns_is_refused(tokenizer):
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    before, tokenizer.chat_template = tokenizer.chat_template, template
    messages = ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"})
    try:
        with pytest.raises(DataError, match="chat template must only append"):
            encode("x", [Chat(messages)], tokenizer, seq_len=64)
    finally:
        tokenizer.chat_template = before


def test_rows_are_counted(tokenizer):
    records = [
        Completion("2+2=", "4"),
        Completion("2+2=", "four, of course"),
        Completion("a prompt beyond the window", "x"),
        Plain("abcdef"),
        Plain(""),
        Plain("gh"),
        Plain("ijkl"),
    ]
    examples, rows = encode_rows("x", records, tokenizer, seq_len=8)
    assert rows == RowCounts(
        kept=2,
        cut=2,
        dropped={
            "no learned token within 8 tokens": 1,
            "empty text": 1,
            "in the rest that fills no window of 8 tokens": 1,
        },
    )
    # "abcdef<eos>g" is the only window of running text.
    assert [len(example.input_ids) for example in examples] == [6, 8, 8]
    assert rows.rows == len(records)
    assert str(rows).startswith("7 rows: 2 whole, 2 cut, 1 dropped (no learned token within 8 tokens), ")


def test_empty_texts_alone_are_refused(tokenizer):
    with pytest.raises(DataError, match="x: must hold text, got 2 empty texts"):
        encode("x", [Plain(""), Plain("")], tokenizer, seq_len=8)


def test_windows_too_short_to_predict_are_refused(tokenizer):
    with pytest.raises(DataError, match="--seq-len must be >= 2 to predict a token, got 1"):
        encode("x", [Plain("abc")], tokenizer, seq_len=1)
    with pytest.raises(DataError, match="--seq-len must be >= 3 to predict a token, got 2"):
        encode("x", [Plain("abc")], tiny_tokenizer("llama3"), seq_len=2)


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
