"""Conversion of rows in other formats (ShareGPT, Alpaca, TRL's conversational prompts) to messages or prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..io.strict_json import JSONRefused, parse_json

Refuse = Callable[[str], Exception]
"""(rule, value) -> the error for a row."""

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from` -> role. `function_call`, a turn of the assistant, is converted separately."""

# Stanford Alpaca's prompts (train.py of tatsu-lab/stanford_alpaca), which are also used with models trained on it.
_ALPACA = (
    "Below is an instruction that describes a task{input}. Write a response that appropriately completes the request."
)
ALPACA = _ALPACA.format(input="") + "\n\n### Instruction:\n{instruction}\n\n### Response:"
ALPACA_WITH_INPUT = (
    _ALPACA.format(input=", paired with an input that provides further context")
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Format(NamedTuple):
    """A format of rows, by its keys.

    needs: keys that every row of the format has.   takes: optional keys that are used.
    """

    needs: frozenset[str]
    takes: frozenset[str] = frozenset()


FORMATS = (
    Format(frozenset({"messages"}), frozenset({"tools"})),
    Format(frozenset({"prompt", "completion"}), frozenset({"tools"})),
    Format(frozenset({"text"})),
    Format(frozenset({"conversations"}), frozenset({"system", "tools"})),
    Format(frozenset({"instruction", "output"}), frozenset({"input"})),
)
"""A row has the first format whose required keys it contains."""


def without_nulls(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row without keys whose value is null, as exports of tables have them, if it then has a format.

    Any other row is returned unchanged, so that the message about it names the null.
    """
    kept = {key: value for key, value in row.items() if value is not None}
    return kept if any(form.needs <= kept.keys() for form in FORMATS) else row


def preference(row: Mapping[str, Any]) -> str:
    """Return the kind of preference data of a row; "" if it is not preference data."""
    if {"chosen", "rejected"} <= row.keys():
        return "a preference of `chosen` to `rejected` (DPO)"
    if {"prompt", "completion"} <= row.keys() and isinstance(row.get("label"), bool):
        return "a judgement of a completion by its `label` (KTO)"
    return ""


def converted(row: Mapping[str, Any], refuse: Refuse) -> Mapping[str, Any]:
    """Convert a row of another format to messages, or to prompt and completion; return any other row unchanged.

    Raises the error made by `refuse` if a part of the row would be lost.
    """
    form = next((form for form in FORMATS if form.needs <= row.keys()), None)
    if form is FORMATS[1] and isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _conversational_prompt(row, refuse)
    if form is FORMATS[3]:
        return _share_gpt(row, refuse)
    if form is FORMATS[4]:
        return _alpaca(row, refuse)
    return row


def used_keys(row: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys of a row that are used."""
    form = next((form for form in FORMATS if form.needs <= row.keys()), None)
    if form is None or (form is FORMATS[1] and isinstance(row["prompt"], str)):
        return form.needs if form else frozenset()
    return form.needs | form.takes


def _conversational_prompt(row: Mapping[str, Any], refuse: Refuse) -> Mapping[str, Any]:
    """Convert TRL's {"prompt": [messages], "completion": [messages]}; the assistant's turns in the prompt are
    context.
    """
    if not all(isinstance(message, dict) for message in (*row["prompt"], *row["completion"])):
        raise refuse("prompt and completion must both be strings, or both lists of messages")
    context = [{**m, "weight": 0} if m.get("role") == "assistant" else m for m in row["prompt"]]
    return {"messages": [*context, *row["completion"]], "tools": row.get("tools")}


def _share_gpt(row: Mapping[str, Any], refuse: Refuse) -> Mapping[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise refuse('conversations must be a list of {"from", "value"}')
    messages = [_turn(turn, i, refuse) if "from" in turn else turn for i, turn in enumerate(turns)]
    if row.get("system"):
        if any(message.get("role") == "system" for message in messages):
            raise refuse("a row with `system` must hold no system turn in its conversations")
        messages.insert(0, {"role": "system", "content": row["system"]})
    return {"messages": messages, "tools": row.get("tools")}


def _turn(turn: Mapping[str, Any], i: int, refuse: Refuse) -> Mapping[str, Any]:
    speaker, value = turn["from"], turn.get("value")
    rest = {key: turn[key] for key in turn.keys() - {"from", "value"}}
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": _calls(value, i, refuse), **rest}
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise refuse(f"conversations[{i}] must be from {', '.join(_SPEAKERS)} or function_call, not {speaker!r:.40}")
    return {"role": role, "content": value, **rest}


def _calls(value: Any, i: int, refuse: Refuse) -> list[dict[str, Any]]:
    try:
        calls = parse_json(value) if isinstance(value, str) else value
    except JSONRefused:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise refuse(f'conversations[{i}], a function_call, must hold {{"name", "arguments"}} in JSON')
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _alpaca(row: Mapping[str, Any], refuse: Refuse) -> Mapping[str, Any]:
    instruction, given, output = row["instruction"], row.get("input") or "", row["output"]
    if not all(isinstance(part, str) for part in (instruction, given, output)):
        raise refuse("instruction, input and output must be strings")
    if row.get("history") or row.get("system"):
        raise refuse("a row with `history` or `system` must be written as `messages`, which hold them")
    template = ALPACA_WITH_INPUT if given else ALPACA
    return {"prompt": template.format(instruction=instruction, input=given), "completion": output}
