"""From records to token windows with labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .records import Chat, Completion, DataError, Plain, Record

IGNORED = -100
"""Label of a token that is not learned."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any: ...


class Example(NamedTuple):
    """input_ids, labels: int64 [T]. labels[t] is the token at t itself, or IGNORED; the loss does the shift."""

    input_ids: Tensor
    labels: Tensor


def encode(source: str, records: Sequence[Record], tokenizer: Tokenizer, seq_len: int) -> list[Example]:
    """Plain texts are joined by the end-of-text token and cut into windows of seq_len; the last, shorter rest is left.

    Prompts with completions and conversations become one example each, cut at seq_len, without what has no learned
    token left.   source: for messages.
    Raises DataError where not one example comes of it.
    """
    stream: list[int] = []
    examples: list[Example] = []
    for record in records:
        if isinstance(record, Plain):
            if stream and tokenizer.eos_token_id is not None:
                stream.append(tokenizer.eos_token_id)
            stream += _ids(tokenizer, record.text)
        else:
            examples += _cut(_spans(source, record, tokenizer), seq_len)
    for start in range(0, len(stream) - seq_len + 1, seq_len):
        window = torch.tensor(stream[start : start + seq_len])
        examples.append(Example(window, window))
    if not examples:
        raise DataError(
            f"{source}: must fill a window of {seq_len} tokens, got {len(stream)}; use more text or a shorter --seq-len"
            if stream
            else f"{source}: must hold a completion that begins within {seq_len} tokens; use a longer --seq-len"
        )
    return examples


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _spans(source: str, record: Completion | Chat, tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """Runs of tokens, each with whether it is learned."""
    if isinstance(record, Completion):
        yield _ids(tokenizer, record.prompt), False
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        yield _ids(tokenizer, record.completion) + end, True
        return
    written = ""
    for i, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        for until, generation_prompt in ((i, True), (i + 1, False)):
            if until == 0:
                continue  # templates refuse to write nothing; a conversation may begin with the assistant
            text = tokenizer.apply_chat_template(
                list(record.messages[:until]), tokenize=False, add_generation_prompt=generation_prompt
            )
            if not text.startswith(written):
                raise DataError(f"{source}: the chat template must only append as turns are added, to tell them apart")
            yield _ids(tokenizer, text[len(written) :]), not generation_prompt
            written = text


def _cut(spans: Iterator[tuple[list[int], bool]], seq_len: int) -> list[Example]:
    ids: list[int] = []
    labels: list[int] = []
    for tokens, learned in spans:
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    ids, labels = ids[:seq_len], labels[:seq_len]
    if all(label == IGNORED for label in labels[1:]):
        return []
    return [Example(torch.tensor(ids), torch.tensor(labels))]
