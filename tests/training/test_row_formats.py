"""Rows of ShareGPT, Alpaca and TRL's conversational prompts; rows of preferences are refused by name."""

from __future__ import annotations

import pytest

from qlora_kernels.training import Chat, Completion, DataError, Plain
from qlora_kernels.training.records import parse_record, unused_keys
from qlora_kernels.training.row_formats import ALPACA, ALPACA_WITH_INPUT

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "record"),
    [
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "system": "be kind"},
            Chat(({"role": "system", "content": "be kind"}, USER, ASSISTANT)),
        ),
        ({"conversations": [USER, ASSISTANT], "tools": '[{"name": "f"}]'}, Chat((USER, ASSISTANT), ({"name": "f"},))),
        (
            {
                "conversations": [
                    {"from": "user", "value": "hi"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "assistant", "value": "yo", "weight": 1},
                ]
            },
            Chat(
                (
                    USER,
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "content": "2"},
                    {**ASSISTANT, "weight": 1},
                )
            ),
        ),
        (
            {"instruction": "Add.", "input": "", "output": "4"},
            Completion(ALPACA.format(instruction="Add."), "4"),
        ),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            Completion(ALPACA_WITH_INPUT.format(instruction="Add.", input="2, 2"), "4"),
        ),
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            Chat((USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT)),
        ),
    ],
)
def test_rows_are_read(row, record):
    assert parse_record("here", row) == record
    assert unused_keys({**row, "id": 3}) == {"id"}


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"text": "hi", "messages": None, "prompt": None, "completion": None}, Plain("hi")),
        ({"text": "hi", "chosen": None, "rejected": None}, Plain("hi")),
        ({"messages": [USER, ASSISTANT], "text": None, "tools": None}, Chat((USER, ASSISTANT))),
        (
            {"instruction": "Add.", "input": None, "output": "4", "text": None},
            Completion(ALPACA.format(instruction="Add."), "4"),
        ),
    ],
    ids=str,
)
def test_nulls_beside_a_format_are_no_part_of_a_row(row, record):
    """Exports of tables write every column into every row; `datasets` leaves them out of Parquet rows too."""
    assert parse_record("here", row) == record
    assert unused_keys(row) == set()


def test_alpacas_prompt_is_stanfords():
    assert ALPACA_WITH_INPUT.format(instruction="A", input="B") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nA\n\n### Input:\nB\n\n### Response:"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, r"a preference of `chosen` to `rejected` \(DPO\)"),
        ({"messages": [USER, ASSISTANT], "chosen": [], "rejected": []}, r"\(DPO\)"),
        ({"prompt": "p", "completion": "c", "label": False}, r"by its `label` \(KTO\)"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            r"conversations\[0\] must be from human, .*'narrator'",
        ),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, r"must hold \{\"name\", \"arguments\"\}"),
        ({"conversations": "x"}, "conversations must be a list"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "must hold a turn of the assistant"),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}, "a string under 'content'"),
        ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, "must be written as `messages`"),
        ({"instruction": "i", "output": 3}, "must be strings"),
        ({"prompt": ["a"], "completion": [ASSISTANT]}, "must both be strings, or both lists of messages"),
        ({"text": b"bytes"}, "got a value of type bytes"),
    ],
)
def test_ambiguous_rows_are_refused(row, message):
    with pytest.raises(DataError, match=f"^here: .*{message}"):
        parse_record("here", row)
