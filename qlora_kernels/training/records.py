"""Records of text, read from files and split into what is trained on and what stays unseen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """The data cannot be used as given. The message names the file, the line and the rule."""


@dataclass(frozen=True)
class Plain:
    """Running text: every token is learned."""

    text: str


@dataclass(frozen=True)
class Completion:
    """Only the completion's tokens are learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation, written out by the tokenizer's chat template; only the assistant's turns are learned."""

    messages: tuple[dict[str, str], ...]


Record = Plain | Completion | Chat


@dataclass(frozen=True)
class Corpus:
    """Records to train on, and records of the same kind that training never sees.   source: for messages."""

    source: str
    train: tuple[Record, ...]
    unseen: tuple[Record, ...]


def read_corpus(path: Path, unseen_fraction: float) -> Corpus:
    """A .jsonl file, one record a line, or any other file as UTF-8 text.

    A line holds {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}, all values strings.
    unseen_fraction: of the records, spread evenly over the file; of a text, its end, cut at a paragraph or a space.
    Raises DataError, with the line's number, for anything else; and where nothing is left for one of the two parts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text, got byte {error.object[error.start]:#04x}") from error
    if not text.strip():
        raise DataError(f"{path}: must hold text, got an empty file")
    if path.suffix != ".jsonl":
        return _split_text(str(path), text, unseen_fraction)
    lines = enumerate(text.splitlines(), start=1)
    records = [_parse(f"{path}:{number}", line) for number, line in lines if line.strip()]
    return _split_records(str(path), records, unseen_fraction)


def language_reference() -> Corpus:
    """Python's language reference, which comes with Python itself: every eighth topic, by name, stays unseen."""
    from pydoc_data.topics import topics

    texts = [topics[name].strip() for name in sorted(topics)]
    return _split_records("builtin", [Plain(text) for text in texts if text], 1 / 8)


def _split_text(source: str, text: str, unseen_fraction: float) -> Corpus:
    wanted = round(len(text) * (1 - unseen_fraction))
    paragraph = text.rfind("\n\n", wanted // 2, wanted)
    cut = paragraph if paragraph > 0 else max(text.rfind(space, 0, wanted) for space in " \n")
    if cut <= 0:
        raise DataError(f"{source}: must be long enough to keep a part unseen, got {len(text)} characters")
    return Corpus(source, (Plain(text[:cut].strip()),), (Plain(text[cut:].strip()),))


def _split_records(source: str, records: Sequence[Record], unseen_fraction: float) -> Corpus:
    if len(records) < 2:
        raise DataError(f"{source}: must hold at least 2 records, one to train on and one unseen, got {len(records)}")
    every = max(2, round(1 / unseen_fraction))
    last = min(every, len(records)) - 1
    unseen = tuple(record for i, record in enumerate(records) if i % every == last)
    train = tuple(record for i, record in enumerate(records) if i % every != last)
    return Corpus(source, train, unseen)


def _parse(place: str, line: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: must be JSON, got {_excerpt(line)} ({error.msg})") from error
    if isinstance(value, dict):
        if _has_texts(value, "text"):
            return Plain(value["text"])
        if _has_texts(value, "prompt", "completion"):
            return Completion(value["prompt"], value["completion"])
        if "messages" in value:
            return _parse_chat(place, value["messages"])
    raise DataError(
        f'{place}: must hold {{"text"}}, {{"prompt", "completion"}} or {{"messages"}}, got {_excerpt(line)}'
    )


def _parse_chat(place: str, messages: Any) -> Chat:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and _has_texts(message, "role", "content") for message in messages
    ):
        raise DataError(f'{place}: messages must be a list of {{"role": str, "content": str}}')
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{place}: messages must hold a turn of the assistant, which is what is learned")
    return Chat(tuple({"role": message["role"], "content": message["content"]} for message in messages))


def _has_texts(value: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(value.get(key), str) for key in keys)


def _excerpt(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")
