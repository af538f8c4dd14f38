"""Conversion of records to token windows with labels, with counts of used, cut and dropped rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .chat_text import ChatTokenizer
from .records import Completion, DataError, Plain, Record
from .text_tokens import MarkedTokens, TextTokens, Tokenizer

IGNORED = -100
"""Label of a token that is not learned."""

_EMPTY = "empty text"
"""The reason for which a text without characters is dropped."""


class Example(NamedTuple):
    """One window of tokens to train on.

    input_ids, labels: int64 [T]. labels[t] is the token at t, or IGNORED; the loss shifts the labels.
    lengths: of the examples that a packed window joins (`packing.pack`); None for a window that is one text.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...] | None = None


@dataclass
class RowCounts:
    """Counts of the rows of a corpus by their use.

    kept: rows whose tokens are all used.
    cut: rows whose tokens beyond a window's end are not used.
    dropped: reason -> number of rows that are not used at all.   context_turns: turns of the assistant that are not
    learned, because the chat template rewrites them when others follow.   straddling: prompts whose last token
    continues into the completion, so that the prompt alone would be tokenized differently.
    """

    kept: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    context_turns: int = 0
    straddling: int = 0

    @property
    def rows(self) -> int:
        """Return the number of rows read, kept and dropped."""
        return self.kept + self.cut + sum(self.dropped.values())

    def drop(self, reason: str) -> None:
        """Count one more dropped row, with its reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows: {self.kept:,} whole"]
        parts += [f"{self.cut:,} cut"] if self.cut else []
        parts += [f"{number:,} dropped ({reason})" for reason, number in self.dropped.items()]
        parts += [f"earlier turns as context only: {self.context_turns:,}"] if self.context_turns else []
        parts += [f"prompts that end inside a token: {self.straddling:,}"] if self.straddling else []
        return ", ".join(parts)


class Encoding(NamedTuple):
    """The examples that were made of a corpus.

    examples: those to train on.   rows: counts of the records by their use.
    """

    examples: list[Example]
    rows: RowCounts


def encode(source: str, records: Sequence[Record], tokenizer: Tokenizer, seq_len: int) -> list[Example]:
    """Return only the examples of `encode_rows`."""
    return encode_rows(source, records, tokenizer, seq_len).examples


def encode_rows(source: str, records: Iterable[Record], tokenizer: Tokenizer, seq_len: int) -> Encoding:
    """Return examples of at most seq_len tokens, with the tokenizer's ids of the whole text (`text_tokens.TextTokens`).

    Plain: each record is a document. Documents are joined by the end-of-text token and cut into windows of seq_len;
    tokens after the last full window are dropped. If the tokenizer begins a text with a token, each document and window
    begins with it.
    Completion: one example, prompt and completion as one text, followed by the end-of-text token.
    Chat: one example, the conversation in the chat template, up to the assistant's last turn.
    Completions and chats are cut at seq_len; an example without a learned token left is dropped. A token with
    characters of both a prompt and a completion is learned.
    source: for messages.
    Raises DataError for a seq_len that is too short to predict a token, for a conversation that the chat template
    refuses, and if the records give no example.
    """
    texts = TextTokens(tokenizer)
    shortest = len(texts.before) + 2
    if seq_len < shortest:
        raise DataError(f"{source}: --seq-len must be >= {shortest} to predict a token, got {seq_len}")
    rows = RowCounts()
    documents = _Documents(texts)
    conversations = ChatTokenizer(texts)
    examples: list[Example] = []
    for record in records:
        if isinstance(record, Plain):
            if record.text:
                documents.add(record.text)
            else:
                rows.drop(_EMPTY)
            continue
        if isinstance(record, Completion):
            tokens = _completion(texts, record)
        else:
            tokens, context_turns = conversations.encode(record)
            rows.context_turns += context_turns
        rows.straddling += tokens.straddling
        example = _example(tokens, seq_len)
        if bool((example.labels[1:] == IGNORED).all()):
            rows.drop(f"no learned token within {seq_len} tokens")
            continue
        rows.cut += len(tokens.ids) > seq_len
        rows.kept += len(tokens.ids) <= seq_len
        examples.append(example)
    examples += [Example(window, window) for window in map(torch.tensor, documents.windows(seq_len, rows))]
    if not examples and documents.stream:
        filled = f"must fill a window of {seq_len} tokens, got {len(documents.stream)}"
        raise DataError(f"{source}: {filled}; use more text or a shorter --seq-len")
    if not examples and rows.dropped.keys() == {_EMPTY}:
        raise DataError(f"{source}: must hold text, got {rows.dropped[_EMPTY]} empty texts")
    if not examples:
        raise DataError(f"{source}: must hold a completion that begins within {seq_len} tokens; use a longer --seq-len")
    return Encoding(examples, rows)


def _completion(texts: TextTokens, record: Completion) -> MarkedTokens:
    text = record.prompt + record.completion
    ids, learned, straddling = texts.marked(text, [(len(record.prompt), len(text))])
    ended = texts.ended(ids + texts.after)
    return MarkedTokens(ended, learned + [True] * (len(ended) - len(ids)), straddling)


def _example(tokens: MarkedTokens, seq_len: int) -> Example:
    ids = torch.tensor(tokens.ids[:seq_len])
    learned = torch.tensor(tokens.learned[:seq_len])
    return Example(ids, torch.where(learned, ids, IGNORED))


class _Documents:
    """Running texts as one stream of tokens, cut into windows."""

    def __init__(self, texts: TextTokens) -> None:
        self.texts = texts
        self.stream: list[int] = []
        self.bounds: list[tuple[int, int]] = []

    def add(self, text: str) -> None:
        """Append a document, preceded by an end-of-text token."""
        if self.stream:
            self.stream += self.texts.ended(self.stream[-1:])[1:]
        start = len(self.stream)
        self.stream += self.texts.ids(text)
        self.bounds.append((start, len(self.stream)))

    def windows(self, seq_len: int, rows: RowCounts) -> list[list[int]]:
        """Return all full windows, and count the documents in `rows`."""
        windows: list[list[int]] = []
        used = 0
        while True:
            following = self.stream[used : used + seq_len]
            window = self.texts.led(following)[:seq_len]
            if len(window) < seq_len:
                break
            windows.append(window)
            used += seq_len - (len(self.texts.led(following)) - len(following))
        for start, end in self.bounds:
            if start >= used:
                rows.drop(f"in the rest that fills no window of {seq_len} tokens")
            else:
                rows.cut += end > used
                rows.kept += end <= used
        return windows
