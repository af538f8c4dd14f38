"""Token ids of whole texts: a beginning-of-text token if the tokenizer adds one, and which tokens are learned.

A text is tokenized as a whole. Tokenizing its parts separately gives other tokens: SentencePiece-like tokenizers put a
word mark before every part, and byte-level ones merge across the boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

Span = tuple[int, int]
"""A range [start, end) of characters of a text."""


class Tokenizer(Protocol):
    """The required interface of a transformers tokenizer.

    Optional attributes: `is_fast`, whether calls accept return_offsets_mapping; `bos_token_id`; `chat_template`, which
    is searched for marks of the assistant's turns.
    """

    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """Return the text or the tokens of a conversation, as transformers' method does."""


class MarkedTokens(NamedTuple):
    """The tokens of a text, of which some are learned.

    ids: tokens of the whole text.   learned: for each token, whether it has a character of the learned spans.
    straddling: number of learned tokens that also have characters before their span.
    """

    ids: list[int]
    learned: list[bool]
    straddling: int


class TextTokens:
    """Token ids of texts in the form in which a model gets them.

    The ids are those of the tokenizer for the whole text, preceded by the tokens that the tokenizer itself puts before
    a text (the beginning of text, for Llama, Mistral, Gemma). A text that already begins with these in writing gets no
    second ones. The output of a chat template gets none, as in transformers, because the template writes all special
    tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.has_offsets = bool(getattr(tokenizer, "is_fast", False))
        # Texts beyond model_max_length are cut later, so that transformers' warning would be misleading.
        self._options: dict[str, Any] = {"verbose": False} if hasattr(tokenizer, "is_fast") else {}
        self.before, self.after = self._added_around()

    def ids(self, text: str, *, from_template: bool = False) -> list[int]:
        """Return the ids of a text without an end: a prompt, or a document that the caller ends.

        from_template: whether a chat template wrote it, with all special tokens.
        """
        return self._plain(text) if from_template else self.led(self._plain(text))

    def led(self, ids: list[int]) -> list[int]:
        """Return `ids`, preceded by the tokens that begin a text unless they are there."""
        there = ids[: len(self.before)] == self.before or ids[:1] == [getattr(self.tokenizer, "bos_token_id", None)]
        return ids if there else self.before + ids

    def ended(self, ids: list[int]) -> list[int]:
        """Return `ids`, followed by the end-of-text token unless it is there or the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def marked(self, text: str, spans: Sequence[Span], *, from_template: bool = False) -> MarkedTokens:
        """Return the ids of `text`, marking those with at least one character in one of the `spans` as learned.

        spans: in order, without overlap.   from_template: as in `ids`.
        """
        if self.has_offsets:
            output = self.tokenizer(  # type: ignore[call-arg]
                text, add_special_tokens=False, return_offsets_mapping=True, **self._options
            )
            ids = list(output["input_ids"])
            learned, straddling = _covered(output["offset_mapping"], spans)
        else:
            ids = self._plain(text)
            learned, straddling = self._covered_by_prefixes(text, ids, spans)
        led = ids if from_template else self.led(ids)
        return MarkedTokens(led, [False] * (len(led) - len(ids)) + learned, straddling)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, **self._options)["input_ids"])

    def _added_around(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer puts before and after a text."""
        for probe in ("a", "0", "the"):
            plain = self._plain(probe)
            whole = list(self.tokenizer(probe, add_special_tokens=True, **self._options)["input_ids"])
            for start in range(len(whole) - len(plain) + 1) if plain else ():
                if whole[start : start + len(plain)] == plain:
                    return whole[:start], whole[start + len(plain) :]
        return [], []

    def _covered_by_prefixes(self, text: str, ids: list[int], spans: Sequence[Span]) -> tuple[list[bool], int]:
        """Mark learned tokens without offsets: the tokens that `text` shares with a prefix of it are inside that
        prefix.
        """
        learned = [False] * len(ids)
        straddling = 0
        for start, end in spans:
            first, apart = self._tokens_within(text[:start], ids)
            last, clean = self._tokens_within(text[:end], ids) if end < len(text) else (len(ids), True)
            stop = last if clean else last + 1
            learned[first:stop] = [True] * (stop - first)
            straddling += not apart
        return learned, straddling

    def _tokens_within(self, beginning: str, ids: list[int]) -> tuple[int, bool]:
        """Return (number of leading tokens of `ids` that `beginning` alone has too, whether these are all its
        tokens).
        """
        alone = self._plain(beginning) if beginning else []
        shared = next(
            (i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids))
        )
        return shared, shared == len(alone)


def shared_beginning(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the longest common prefix."""
    shortest = min(len(one), len(other))
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)


def _covered(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[list[bool], int]:
    learned: list[bool] = []
    straddling = 0
    following = 0  # index of the first span that does not end before the token
    for start, end in offsets:
        while following < len(spans) and start >= spans[following][1]:
            following += 1
        # A token without characters (an inserted word mark) belongs to the character after it.
        inside = following < len(spans) and max(end, start + 1) > spans[following][0]
        learned.append(inside)
        straddling += inside and start < spans[following][0]
    return learned, straddling
