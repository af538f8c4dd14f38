"""Conversations in the tokenizer's chat template, and detection of the tokens of the assistant's turns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .records import REASONING, Chat, DataError
from .text_tokens import MarkedTokens, Span, TextTokens, shared_beginning

Messages = Sequence[Mapping[str, Any]]

_PROGRAM_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Exceptions of templates, which are programs, in addition to their own refusals: for null + "text" and the like."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefusal(ValueError):
    """The chat template refuses this conversation. The message has the template's message, on one line."""


class ChatTokens(NamedTuple):
    """The tokens of a conversation, and how much of it is context only.

    tokens: those up to the end of the assistant's last turn.
    context_turns: number of the assistant's turns that are not learned: those of weight 0, and those that the template
    writes in another form than the model generates them in.
    """

    tokens: MarkedTokens
    context_turns: int


def write_chat(tokenizer: Any, messages: Messages, tools: Messages = (), *, generation_prompt: bool) -> str:
    """Return the text of a conversation.   generation_prompt: append the text that starts the assistant's next turn.

    Raises TemplateRefusal if the tokenizer has no chat template or the template fails.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", True):
        raise TemplateRefusal("the tokenizer must have a chat template; use a model that was trained on conversations")
    options = {"tools": list(tools)} if tools else {}
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt, **options
        )
    # A template is a program: it can also raise Python's errors, for example for null + "text".
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TemplateRefusal(f"the chat template refuses the conversation: {reason}") from error
    return str(text)


class ChatTokenizer:
    """Converts conversations to tokens, and marks those of the assistant's turns as learned.

    If the template marks the assistant's words ({% generation %}), those are learned. Otherwise a turn is learned if
    the text of the conversation up to that turn is a prefix of the whole text, because the turn then has the form that
    the model generates. Templates that rewrite earlier turns (by dropping their reasoning) leave at least the last
    turn.
    """

    def __init__(self, texts: TextTokens) -> None:
        self.texts = texts
        self.tokenizer: Any = texts.tokenizer

    def encode(self, chat: Chat) -> ChatTokens:
        """Raise DataError, with the conversation's place, if the template refuses it or omits a part of it."""
        last = max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
        try:
            messages = self._with_content(chat.messages[: last + 1], chat.tools)
            messages = self._with_fitting_arguments(messages, chat.tools)
            whole = self._write(messages, chat.tools)
            self._check_all_is_written(messages, chat.tools, whole)
            if self._marks_generation(chat.tools):
                if any(message.get("weight") == 0 for message in messages):
                    raise DataError("messages must have no weight 0 where the chat template marks what is learned")
                return ChatTokens(self._generated(messages, chat.tools), 0)
            spans, context_turns = self._learned_spans(messages, chat.tools, whole)
        except (TemplateRefusal, DataError) as error:
            raise DataError(f"{chat.place or 'a conversation'}: {error}") from error
        return ChatTokens(self.texts.marked(whole, spans, from_template=True), context_turns)

    def _write(self, messages: Messages, tools: Messages, *, generation_prompt: bool = False) -> str:
        return write_chat(self.tokenizer, messages, tools, generation_prompt=generation_prompt)

    def _write_or_none(self, messages: Messages, tools: Messages, *, generation_prompt: bool = False) -> str | None:
        try:
            return self._write(messages, tools, generation_prompt=generation_prompt)
        except TemplateRefusal:
            return None

    def _marks_generation(self, tools: Messages) -> bool:
        if not self.texts.has_offsets or not hasattr(self.tokenizer, "get_chat_template"):
            return False
        return _GENERATION.search(self.tokenizer.get_chat_template(None, list(tools) or None)) is not None

    def _generated(self, messages: Messages, tools: Messages) -> MarkedTokens:
        """Return the tokens with the template's own marks."""
        output = self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, learned = list(output["input_ids"]), [bool(mark) for mark in output["assistant_masks"]]
        return MarkedTokens(ids, learned, 0)

    def _learned_spans(self, messages: Messages, tools: Messages, whole: str) -> tuple[list[Span], int]:
        spans: list[Span] = []
        context_turns = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if message.get("weight") == 0:
                context_turns += 1
                continue
            is_last = i == len(messages) - 1
            until = whole if is_last else self._write_or_none(messages[: i + 1], tools)
            start = self._start_of_turn(messages, i, tools, whole)
            if until is not None and whole.startswith(until) and start is not None and start < len(until):
                spans.append((max(start, spans[-1][1] if spans else 0), len(until)))
            elif is_last:
                raise DataError(
                    "the chat template must only append the assistant's last turn to what it writes before it, to tell "
                    "them apart"
                )
            else:
                context_turns += 1
        return spans, context_turns

    def _start_of_turn(self, messages: Messages, i: int, tools: Messages, whole: str) -> int | None:
        """Return the start of turn i in `whole`: after the generation prompt, or after the part of it that is
        present.
        """
        if i == 0:  # a conversation may begin with the assistant, and templates refuse an empty one
            return max(whole.find(str(messages[0].get("content", ""))), 0)
        prompted = self._write_or_none(messages[:i], tools, generation_prompt=True)
        if prompted is not None and whole.startswith(prompted):
            return len(prompted)
        # The prompt may contain more than the turn ("<think>" if the turn has no reasoning).
        before = self._write(messages[:i], tools)
        if not whole.startswith(before):
            return None
        return max(len(before), shared_beginning(prompted or "", whole))

    def _with_content(self, messages: Messages, tools: Messages) -> Messages:
        """Return the messages, with an empty content for turns without one if the template needs it."""
        if all("content" in message for message in messages) or self._write_or_none(messages, tools) is not None:
            return messages
        return [{"content": "", **message} for message in messages]

    def _with_fitting_arguments(self, messages: Messages, tools: Messages) -> Messages:
        """Return the messages with tool-call arguments as objects, if the template would quote a JSON string.

        APIs return `arguments` as a string of JSON; most templates write them with the filter `tojson`.
        """
        given = [_arguments(call) for message in messages for call in message.get("tool_calls", ())]
        strings = [arguments for arguments in given if isinstance(arguments, str)]
        if not strings:
            return messages
        text = self._write_or_none(messages, tools)
        if text is not None and not any(json.dumps(s, ensure_ascii=False) in text for s in strings):
            return messages
        return [_with_objects(message) for message in messages]

    def _check_all_is_written(self, messages: Messages, tools: Messages, whole: str) -> None:
        """Raise DataError if the text does not change when the tools, the tool calls or the reasoning are removed."""
        if tools and self._write_or_none(messages, ()) == whole:
            raise DataError("the chat template does not write `tools`; use a model whose template does")
        for keys in (("tool_calls",), ("function_call",), REASONING):
            holders = [i for i, message in enumerate(messages) if any(message.get(key) for key in keys)]
            if not holders:
                continue
            # Only the last one is checked, because templates may omit the reasoning of earlier turns.
            *earlier, message = messages[: holders[-1] + 1]
            without = {key: value for key, value in message.items() if key not in keys}
            text = self._write_or_none([*earlier, message], tools)
            if text is not None and text == self._write_or_none([*earlier, without], tools):
                key = next(key for key in keys if message.get(key))
                raise DataError(
                    f"the chat template does not write `{key}` of messages[{holders[-1]}]; use a model whose template "
                    "does, or put it into `content` the way the model is to write it"
                )


def _arguments(call: Mapping[str, Any]) -> Any:
    function = call.get("function", call)
    return function.get("arguments") if isinstance(function, dict) else None


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(_arguments(call), str):
        return call
    try:
        value = json.loads(_arguments(call))
    except (json.JSONDecodeError, RecursionError):
        return call
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": value}}
    return {**call, "arguments": value}
