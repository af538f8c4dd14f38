"""Conversations: ids of the template's whole text, learned assistant turns, and no omitted part of a record."""

from __future__ import annotations

import copy
import json

import pytest

from qlora_kernels.training import Chat, DataError, TextTokens, encode, encode_rows, read_corpus, write_chat
from qlora_kernels.training.windows import IGNORED
from tests.support.tiny_model import write_jsonl
from tests.support.tiny_tokenizers import FAMILIES, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3's rule: reasoning is kept in the turns after the last user turn, and the last turn always has a block for it.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% set content = m.content if m.content is string else '' %}"
    "{% set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONS_ALWAYS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def with_template(family: str, template: str):
    tokenizer = copy.copy(tiny_tokenizer(family))
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str) -> tuple[dict, ...]:
    """Return turns of user and assistant in alternation."""
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents))


def learned(tokenizer, example) -> str:
    return tokenizer.decode(example.input_ids[example.labels != IGNORED])


def encoded(tokenizer, messages, tools=()):
    """Return (whole text, learned text) of one conversation."""
    [example] = encode("x", [Chat(tuple(messages), tuple(tools))], tokenizer, 2000)
    return tokenizer.decode(example.input_ids), learned(tokenizer, example)


def refusal(tokenizer, messages, tools=()) -> str:
    with pytest.raises(DataError) as error:
        encode("x", [Chat(tuple(messages), tuple(tools), place="data.jsonl:7")], tokenizer, 2000)
    message = str(error.value)
    assert message.startswith("data.jsonl:7: the chat template ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [CHATML, WITH_BOS, MARKED], ids=["plain", "with-bos", "marked"])
def test_ids_are_those_of_the_whole_text(family, template):
    tokenizer = with_template(family, template)
    messages = turns("What is the answer?", "yes", "hello there", "hello to you too")
    [example] = encode("x", [Chat(messages)], tokenizer, 2000)
    ids = example.input_ids.tolist()
    # There is one beginning of text if the template writes it, otherwise none, as in transformers and TRL.
    assert ids == list(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])
    prompt = write_chat(tokenizer, messages[:1], generation_prompt=True)
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert TextTokens(tokenizer).ids(prompt, from_template=True) == list(asked)
    end = "<|im_end|>" + ("" if template is MARKED and tokenizer.is_fast else "\n")
    spoken = learned(tokenizer, example)
    # Tokens with the end of a turn and the beginning of the next one are learned.
    assert spoken.split("<|im_end|>")[0].endswith("yes")
    assert spoken.rstrip().endswith("hello to you too<|im_end|>")
    if family in ("gpt2", "qwen", "llama3"):
        assert spoken == f"yes{end}hello to you too{end}"


def test_generation_prompt_begins_the_learned_turn():
    tokenizer = with_template("llama3", WITH_BOS)
    messages = turns("What is the answer?", "yes")
    prompt = write_chat(tokenizer, messages[:1], generation_prompt=True)
    assert encoded(tokenizer, messages) == (prompt + "yes<|im_end|>\n", "yes<|im_end|>\n")


def test_turns_after_last_assistant_turn_are_dropped():
    tokenizer = with_template("gpt2", CHATML)
    assert encoded(tokenizer, turns("a", "b", "c")) == encoded(tokenizer, turns("a", "b"))


def test_conversation_may_begin_with_the_assistant():
    tokenizer = with_template("gpt2", CHATML)
    assert encoded(tokenizer, turns("", "hello", "you", "too")[1:])[1] == "hello<|im_end|>\ntoo<|im_end|>\n"


def test_template_that_rewrites_earlier_turns():
    """Rewritten turns are context; the last turn is learned in the form the model generates."""
    tokenizer = with_template("gpt2", QWEN3)
    messages = turns("hi", "<think>\none\n</think>\n\nyo", "more", "<think>\ntwo\n</think>\n\nok", "bye")
    encoding = encode_rows("x", [Chat(messages)], tokenizer, 2000)
    assert encoding.rows.context_turns == 1
    assert "earlier turns as context only: 1" in str(encoding.rows)
    [example] = encoding.examples
    assert tokenizer.decode(example.input_ids) == write_chat(tokenizer, messages[:4], generation_prompt=False)
    assert "one" not in tokenizer.decode(example.input_ids)
    assert learned(tokenizer, example) == "<think>\ntwo\n</think>\n\nok<|im_end|>\n"
    assert encoded(tokenizer, turns("hi", "yo", "more", "ok"))[1] == "<think>\n\n</think>\n\nok<|im_end|>\n"
    # The turns after one question are not rewritten.
    call = {"role": "assistant", "reasoning_content": "look", "tool_calls": [CALL]}
    tool_use = (*turns("hi"), call, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "wet"})
    spoken = encoded(tokenizer, tool_use, [TOOL])[1]
    assert spoken == (
        '<think>\nlook\n</think>\n\n<tool_call>weather {"city": "Rome"}</tool_call><|im_end|>\n'
        "<think>\n\n</think>\n\nwet<|im_end|>\n"
    )


def test_generation_prompt_longer_than_turn_start():
    """The turn begins where the prompt and the conversation differ."""
    tokenizer = with_template("gpt2", REASONS_ALWAYS)
    assert encoded(tokenizer, turns("hi", "yo", "more", "ok"))[1] == "yo<|im_end|>\nok<|im_end|>\n"
    thinking = turns("hi", "<think>\nhm</think>ok")
    assert encoded(tokenizer, thinking)[1] == "hm</think>ok<|im_end|>\n"


def test_template_rewriting_text_before_last_turn_is_refused():
    tokenizer = with_template("gpt2", "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}")
    assert "must only append the assistant's last turn" in refusal(tokenizer, turns("a", "b"))


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_marks_and_appended_turns_agree(template):
    messages = turns("What is the answer?", "yes", "hello there", "hello to you too")
    spoken = encoded(with_template("llama3", template), messages)[1]
    assert spoken.replace("\n", "") == "yes<|im_end|>hello to you too<|im_end|>"


TOOLS_TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ ARGUMENTS }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_template_receives_tools_calls_and_reasoning(tmp_path, key, content):
    tokenizer = with_template("gpt2", TOOLS_TEMPLATE.replace("ARGUMENTS", "c.function.arguments | tojson"))
    messages = [*turns("hi"), {"role": "assistant", **content, key: "because", "tool_calls": [CALL]}]
    rows = [{"messages": messages, "tools": [TOOL]}]
    [chat] = read_corpus(write_jsonl(tmp_path / "a.jsonl", rows), 0).train
    whole, spoken = encoded(tokenizer, chat.messages, chat.tools)
    assert whole.startswith("<tool>weather<|im_start|>user\nhi<|im_end|>")
    assert spoken == '<think>because</think><call>weather {"city": "Rome"}<|im_end|>\n'


def test_template_that_needs_content_gets_an_empty_one():
    call = {"role": "assistant", "tool_calls": [CALL]}
    needs = TOOLS_TEMPLATE.replace("m.content or ''", "m.content + ''").replace("ARGUMENTS", "''")
    assert encoded(with_template("gpt2", needs), [*turns("hi"), call])[1] == "<call>weather <|im_end|>\n"
    assert "does not write `tool_calls`" in refusal(with_template("gpt2", CHATML), [*turns("hi"), call])


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'], ids=["object", "string"])
@pytest.mark.parametrize(
    "written",
    [
        "c.function.arguments | tojson",
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
        "'{' + c.function.arguments.items() | map('join', ': ') | join(', ') + '}'",
    ],
    ids=["tojson", "either", "items"],
)
def test_arguments_of_calls_are_not_quoted_twice(arguments, written):
    tokenizer = with_template("gpt2", TOOLS_TEMPLATE.replace("ARGUMENTS", written))
    call = {"function": {"name": "weather", "arguments": arguments}}
    _, spoken = encoded(tokenizer, [*turns("hi"), {"role": "assistant", "tool_calls": [call]}])
    assert spoken in ('<call>weather {"city": "Rome"}<|im_end|>\n', "<call>weather {city: Rome}<|im_end|>\n")


@pytest.mark.parametrize(
    ("message", "tools", "words"),
    [
        ({"content": "yo"}, [TOOL], "does not write `tools`"),
        ({"content": "yo", "tool_calls": [CALL]}, [], "does not write `tool_calls` of messages[1]"),
        ({"content": "yo", "reasoning_content": "why"}, [], "does not write `reasoning_content` of messages[1]"),
        ({"content": "yo", "thinking": "why"}, [], "does not write `thinking` of messages[1]"),
    ],
)
def test_keys_ignored_by_template_are_refused(message, tools, words):
    tokenizer = with_template("gpt2", CHATML)
    messages = [*turns("hi"), {"role": "assistant", **message}, *turns("thanks", "bye")]
    assert words in refusal(tokenizer, messages, tools)


def test_reasoning_of_earlier_turns_may_be_left_out():
    tokenizer = with_template("gpt2", QWEN3)
    first = {"role": "assistant", "content": "yo", "reasoning_content": "why"}
    whole, spoken = encoded(tokenizer, [*turns("hi"), first, *turns("more", "ok")])
    assert "why" not in whole
    assert spoken == "<think>\n\n</think>\n\nok<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role not supported') }}", "refuses the conversation: System role not supported"),
        ("{% for m in messages %}{{ m.nothing.here }}{% endfor %}", "refuses the conversation: 'dict object' has no"),
        ("{% for m in messages %}{{ m.role + 1 }}{% endfor %}", "refuses the conversation: can only concatenate str"),
        ("{% for m in messages %}{{ 1 // 0 }}{% endfor %}", "refuses the conversation: "),
        ("{% for m in messages %}{% endif %}", "refuses the conversation: "),
        ("{{ messages.__class__.__mro__ }}", "refuses the conversation: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses the conversation: "),
        (None, "must have a chat template"),
    ],
)
def test_refusals_of_the_template_name_the_record(template, words):
    tokenizer = with_template("gpt2", template)
    with pytest.raises(DataError) as error:
        encode("x", [Chat(turns("hi", "yo"), place="data.jsonl:7")], tokenizer, 2000)
    assert str(error.value).startswith("data.jsonl:7: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_deep_tools_are_refused():
    parameters: list = []
    for _ in range(5000):
        parameters = [parameters]
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert "maximum recursion depth" in refusal(with_template("gpt2", QWEN3), turns("hi", "yo"), tools)


def test_unrecorded_place():
    with pytest.raises(DataError, match=r"^a conversation: the chat template refuses"):
        encode("x", [Chat(turns("hi", "yo"))], with_template("gpt2", "{{ raise_exception('no') }}"), 2000)


def test_turns_of_weight_zero_are_context(tmp_path):
    tokenizer = with_template("gpt2", CHATML)
    messages = [dict(message) for message in turns("What is the answer?", "no", "hello there", "yes")]
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    encoding = encode_rows("x", [Chat(tuple(messages))], tokenizer, 2000)
    assert learned(tokenizer, encoding.examples[0]) == "yes<|im_end|>\n"
    assert encoding.rows.context_turns == 1
    messages[3]["weight"] = 0
    with pytest.raises(DataError, match="must hold a completion"):
        encode("x", [Chat(tuple(messages))], tokenizer, 2000)
    with pytest.raises(DataError, match="must have no weight 0"):
        encode("x", [Chat(tuple(messages))], with_template("gpt2", MARKED), 2000)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [messages[0], {**messages[1], "weight": 0.5}]}))
    with pytest.raises(
        DataError, match=r"messages\[1\] must hold 0 \(context only\) or 1 under 'weight', got a number"
    ):
        read_corpus(path, 0.0)


def test_function_call_ignored_by_template_is_refused():
    call = {"role": "assistant", "content": "", "function_call": {"name": "weather", "arguments": "{}"}}
    message = refusal(with_template("gpt2", CHATML), [*turns("hi"), call])
    assert "does not write `function_call` of messages[1]" in message
