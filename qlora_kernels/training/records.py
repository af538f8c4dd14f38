"""Records of text: the permitted contents of one row of a data file, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..io.strict_json import JSONRefused, parse_json
from .row_formats import converted, preference, used_keys, without_nulls

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold its reasoning."""
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}


class DataError(ValueError):
    """The data cannot be used. The message names the file, the line and the rule."""


@dataclass(frozen=True)
class Plain:
    """Running text. Every token is learned.
    place: its origin, for messages.
    """

    text: str
    place: str = field(default="", compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Completion:
    """A prompt and a completion. Only the completion is learned.
    place: its origin, for messages.
    """

    prompt: str
    completion: str
    place: str = field(default="", compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Chat:
    """A conversation, written by the tokenizer's chat template. Only the assistant's turns are learned.

    messages: dicts with at least "role"; the template gets every key.   tools: the functions available to the model, as
    JSON schemas.   place: its origin, for messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    place: str = field(default="", compare=False, repr=False, kw_only=True)


Record = Plain | Completion | Chat


def parse_record(place: str, value: Any) -> Record:
    """Return the record in a row: {"text"}, {"prompt", "completion"} or {"messages"}, with or without "tools".

    place: for messages.   value: of any type. Other keys are ignored (`unused_keys` lists them), and so are keys whose
    value is null beside those of a format.
    Raises DataError for any other row.
    """
    if isinstance(value, dict):
        value = without_nulls(value)
        if kind := preference(value):
            raise DataError(
                f"{place}: must not be {kind}, which supervised training has no use for; write what is to be learned "
                'as {"prompt", "completion"} or {"messages"}, or use a trainer of preferences such as TRL\'s DPOTrainer'
            )
        value = converted(value, lambda rule: DataError(f"{place}: {rule}"))
        if "messages" in value:
            tools = _list_of_objects(place, "tools", value.get("tools"))
            return Chat(_messages(place, value["messages"]), tools, place=place)
        if "prompt" in value and "completion" in value:
            prompt, completion = _string(place, value, "prompt"), _string(place, value, "completion")
            return Completion(prompt, completion, place=place)
        if "text" in value:
            return Plain(_string(place, value, "text"), place=place)
    raise DataError(
        f'{place}: must hold {{"text"}}, {{"prompt", "completion"}} or {{"messages"}}, got {excerpt(value)}; '
        '{"conversations"} of ShareGPT and {"instruction", "input", "output"} of Alpaca are taken too'
    )


def unused_keys(value: Mapping[str, Any]) -> set[str]:
    """Return the keys of a row that `parse_record` ignored, without those whose value is null."""
    value = without_nulls(value)
    return set(value) - used_keys(value)


def excerpt(value: object) -> str:
    """Return a short form of a value for a message: a string's beginning, an object's keys, or the kind of value."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, dict):
        keys = ", ".join(repr(key[:30]) for key in list(value)[:6])
        return f"the keys {keys}{', ...' if len(value) > 6 else ''}" if value else "no key"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return excerpt(", ".join(value))
    return _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def _string(place: str, row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{place}: must hold a string under {key!r}, got {excerpt(row[key])}")
    return str(row[key])


def _messages(place: str, messages: object) -> tuple[Mapping[str, Any], ...]:
    rule = f'{place}: messages must be a list of {{"role": str, "content": str}}'
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{rule}, got {excerpt(messages)}")
    checked = tuple(_message(f"{rule}; messages[{i}]", message) for i, message in enumerate(messages))
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError(f"{place}: messages must hold a turn of the assistant, which is what is learned")
    return checked


def _message(place: str, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the message without keys whose value is null."""
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if not isinstance(role, str):
        raise DataError(f"{place} must hold a string under 'role', got {excerpt(role)}")
    for key in ("content", *REASONING):
        if not isinstance(kept.get(key, ""), str):
            raise DataError(
                f"{place} must hold a string under {key!r}, got {excerpt(kept[key])}; content in parts, such as "
                "images, is not supported"
            )
    if kept.get("weight", 1) not in (0, 1):
        raise DataError(f"{place} must hold 0 (context only) or 1 under 'weight', got {excerpt(kept['weight'])}")
    if "tool_calls" in kept:
        kept["tool_calls"] = list(_list_of_objects(place, "tool_calls", kept["tool_calls"]))
    carriers = ("content", "tool_calls", *REASONING) if role == "assistant" else ("content",)
    if not any(key in kept for key in carriers):
        raise DataError(f"{place}, of role {excerpt(role)}, must hold {' or '.join(carriers)}")
    return kept


def _list_of_objects(place: str, key: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return `value` as a tuple of dicts; a string is parsed as JSON, because tables cannot hold mixed objects."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except JSONRefused as error:
            raise DataError(f"{place}: {key} must be a list of objects, got {excerpt(value)} ({error})") from error
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{place}: {key} must be a list of objects, got {excerpt(value)}")
    return tuple(value)
