"""From data files to records, and from records to training and held-out parts."""

from __future__ import annotations

import csv
import json

import pytest

from qlora_kernels.training import Chat, Completion, DataError, Plain, language_reference, read_corpus
from tests.support.tiny_model import write_jsonl

CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PAIRS = [{"prompt": f"q{i} ", "completion": f"a{i}"} for i in range(8)]
AS_COMPLETIONS = [Completion(pair["prompt"], pair["completion"]) for pair in PAIRS]


def records(path, content: bytes | str, unseen_fraction: float = 0.0) -> list:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_corpus(path, unseen_fraction).train)


def refusal(path, content: bytes | str, unseen_fraction: float = 0.1) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as error:
        read_corpus(path, unseen_fraction)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_jsonl_kinds_and_split(tmp_path):
    rows = [{"text": str(i)} for i in range(8)] + [{"prompt": "p", "completion": "c"}, {"messages": TURNS}]
    corpus = read_corpus(write_jsonl(tmp_path / "data.jsonl", rows), unseen_fraction=0.2)
    assert corpus.unseen == (Plain("4"), Chat(tuple(TURNS)))
    assert corpus.train[-1] == Completion("p", "c")
    assert len(corpus.train) == 8
    assert corpus.train[-1].place == f"{tmp_path / 'data.jsonl'}:9"


LINES = "\n".join(json.dumps(pair) for pair in PAIRS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("A.JSONL", LINES),
        ("blank-lines.jsonl", LINES.replace("\n", "\n\n  \n") + "\n\n"),
        ("crlf.jsonl", LINES.replace("\n", "\r\n") + "\r\n"),
        ("cr.jsonl", LINES.replace("\n", "\r")),
        ("byte-order-mark.jsonl", "\ufeff" + LINES),
        ("array.json", json.dumps(PAIRS)),
        ("indented-array.JSON", "\ufeff\n" + json.dumps(PAIRS, indent=2).replace("\n", "\r\n")),
        ("lines.json", LINES),
        ("a.csv", "prompt,completion\n" + "\n".join(f'"q{i} ",a{i}' for i in range(8))),
        ("a.CSV", "\ufeffcompletion,prompt\r\n" + "\r\n".join(f"a{i},q{i} " for i in range(8)) + "\r\n\r\n"),
        ("index.csv", "\n\n,prompt,completion\n" + "\n".join(f"{i},q{i} ,a{i}" for i in range(8))),
        ("a.tsv", "prompt\tcompletion\n" + "\n".join(f"q{i} \ta{i}" for i in range(8))),
    ],
)
def test_files_of_records(tmp_path, name, content):
    assert records(tmp_path / name, content) == AS_COMPLETIONS


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.text", "a.md", "a.markdown", "a.rst"])
def test_files_of_running_text(tmp_path, name):
    assert records(tmp_path / name, '\ufeff{"text": "x"}\r\nsecond line\r\n') == [Plain('{"text": "x"}\nsecond line')]


@pytest.mark.parametrize("name", ["a.csvv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.yaml", "a.pdf", "a"])
def test_other_suffixes_are_refused(tmp_path, name):
    message = refusal(tmp_path / name, "many words\n\nand more " * 20)
    assert f"{tmp_path / name}: must end in one of .jsonl .ndjson .json .csv .tsv .txt" in message
    assert "rename a text to .txt" in message


def test_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="must be a file, got a folder"):
        read_corpus(tmp_path, 0.1)


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_line_separators_of_unicode_do_not_end_a_row(tmp_path, name, ensure_ascii):
    texts = [f"row {i}\u2028second\u2029third\u0085fourth\x0bfifth\x0csixth\x1cseventh 🙂" for i in range(3)]
    rows = [{"text": text} for text in texts]
    path = tmp_path / name
    if name.endswith("csv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text"])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith("jsonl"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=ensure_ascii) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=ensure_ascii), encoding="utf-8")
    assert list(read_corpus(path, 0).train) == [Plain(text) for text in texts]


def test_csv_cells(tmp_path):
    long = "word " * 60_000  # longer than the csv module's default limit
    content = f'text,label\n"two\nlines, ""quoted""",1\n{long},0\n'
    limit = csv.field_size_limit()
    assert records(tmp_path / "a.csv", content) == [Plain('two\nlines, "quoted"'), Plain(long)]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt;completion\na;b\n", 'a.csv:2: must hold {"text"}, {"prompt", "completion"} or {"messages"}, got the'),
        ("prompt,completion\na,b\na\n", "a.csv:3: must hold 2 cells, as the header does, got 1"),
        ("prompt,completion\na,b,c\n", "a.csv:2: must hold 2 cells, as the header does, got 3"),
        ("text,text\na,b\n", "a.csv:1: must begin with different names"),
        ('text\n"a\n', "a.csv:2: must be cells with ',' between"),
        ("text\n", "must hold at least 2 records"),
        ("messages\n[]\n", "messages must be a list"),
    ],
)
def test_csv_refusals(tmp_path, content, message):
    assert message in refusal(tmp_path / "a.csv", content)


def test_keys_of_chat_rows_are_kept(tmp_path):
    turns = [
        {"role": "user", "content": "q", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
        {"role": "assistant", "reasoning": "no content"},
    ]
    rows = [
        {"messages": turns, "tools": [TOOL], "id": 1},
        {"messages": TURNS, "tools": None},
        {"messages": TURNS, "tools": json.dumps([TOOL]), "source": "s"},
    ]
    corpus = read_corpus(write_jsonl(tmp_path / "a.jsonl", rows), 0)
    whole, without, as_json = corpus.train
    assert whole.messages[0] == turns[0]
    assert whole.messages[1] == {"role": "assistant", "tool_calls": [CALL]}
    assert whole.messages[3]["reasoning_content"] == "because"
    assert whole.tools == as_json.tools == (TOOL,)
    assert without.tools == ()
    assert corpus.unused == ("id", "source")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', "a.jsonl:3: must be JSON"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "x"}\n', 'a.jsonl:2: must hold {"text"}'),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: must hold a string under 'text', got a number"),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": null}\n',
            "must hold a string under 'completion', got null",
        ),
        ("a.jsonl", '["x"]\n', "a.jsonl:1: must hold"),
        ("a.jsonl", '{"text": "x"}\n', "at least 2 records"),
        ("a.jsonl", " \n", "empty file"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: must be JSON, got '[[["),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "an integer with too many digits"),
        ("a.jsonl", '{"text": "x", "weight": NaN}', "a.jsonl:1: must be JSON"),
        ("a.jsonl", '{"text": "x", "weight": 1e999}', "got one beyond the range of float64"),
        ("a.jsonl", '{"text": "x", "text": "y"}', "the key 'text' occurs twice in one object"),
        ("a.jsonl", r'{"text": "\ud83d"}', "half of a surrogate pair"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '[{"text": "x"}, {"txt": "y"}]', "a.json: record 2: must hold"),
        (
            "a.json",
            '{\n "train": [{"text": "x"}]\n}',
            "must hold an array of records, or one record a line, got",
        ),
        ("a.json", '[{"text": "x"},', "a.json: must be JSON"),
        ("a.txt", "", "empty file"),
        ("a.txt", "\ufeff", "empty file"),
        ("a.txt", "word", "long enough to keep a part unseen"),
        ("a.txt", b"\xff\xfe", "must be UTF-8 text, got byte 0xff"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "must be UTF-8 text, got byte 0xff"),
    ],
)
def test_refusals(tmp_path, name, content, message):
    assert message in refusal(tmp_path / name, content)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}]}, "messages must be a list"),
        ({"messages": {"role": "user", "content": "x"}}, "messages must be a list"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [["user", "x"]]}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "a turn of the assistant"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0] must hold a string under 'role', got a number"),
        ({"messages": [*TURNS, {"role": "user", "content": None}]}, "messages[2], of role 'user', must hold content"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "must hold content or tool_calls or",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}, "content in parts"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "tool_calls must be a list of objects"),
        ({"messages": [{"role": "assistant", "content": "x", "reasoning": 1}]}, "a string under 'reasoning'"),
        ({"messages": TURNS, "tools": {"name": "weather"}}, "tools must be a list of objects, got the keys 'name'"),
        ({"messages": TURNS, "tools": ["weather"]}, "tools must be a list of objects"),
        ({"messages": TURNS, "tools": "[weather]"}, "tools must be a list of objects"),
        ({"question": "x", "input": "", "output": "y"}, "got the keys 'question', 'input', 'output'"),
    ],
)
def test_invalid_rows_are_refused(tmp_path, row, message):
    assert message in refusal(tmp_path / "a.jsonl", json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("n", "fraction", "unseen"),
    [
        (20, 0, []),
        (20, 0.1, [9, 19]),
        (10, 0.3, [3, 6, 9]),
        (10, 0.9, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (3, 0.1, [2]),
        (2, 0.99, [1]),
        (4, 0.9999999999, [1, 2, 3]),
        (4, 1e-320, [3]),
        (1, 0, []),
        (79, 1 / 8, [7, 15, 23, 31, 39, 47, 55, 63, 71]),
    ],
)
def test_unseen_fraction_of_records(tmp_path, n, fraction, unseen):
    corpus = read_corpus(write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(n)]), fraction)
    assert [int(record.text) for record in corpus.unseen] == unseen
    assert [int(record.text) for record in corpus.train] == [i for i in range(n) if i not in unseen]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_unseen_fraction_of_a_text(tmp_path, fraction):
    path = tmp_path / "data.txt"
    path.write_text("a b c d\n\n" * 50)
    corpus = read_corpus(path, fraction)
    assert "\n\n".join([corpus.train[0].text, corpus.unseen[0].text]) == path.read_text().strip()
    assert corpus.unseen[0].text.startswith("a b c d\n\n")
    assert abs(len(corpus.unseen[0].text) / len(path.read_text()) - fraction) < 0.05


def test_unseen_fraction_zero_of_text(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("word")
    corpus = read_corpus(path, 0)
    assert (corpus.train, corpus.unseen) == ((Plain("word"),), ())


def test_language_reference():
    corpus = language_reference()
    assert len(corpus.train) > 6 * len(corpus.unseen) > 0
    assert not set(corpus.train) & set(corpus.unseen)
