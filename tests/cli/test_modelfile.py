"""The Modelfile of `export --ollama`, read by the rules of Ollama's parser."""

from __future__ import annotations

import re

import pytest

from qlora_kernels.cli.export import modelfile

STOPS = ["<|im_end|>", "</s> ", 'say "end"', '"', "\\n", "two\nlines", 'a"\nb', "<\uff5cend\u2581of\u2581text\uff5c>"]


@pytest.mark.parametrize("stop", STOPS)
def test_modelfile_is_read_by_ollamas_grammar(stop):
    assert read_modelfile(modelfile(4096, stop)) == {"FROM": "./model.gguf", "num_ctx": "4096", "stop": stop}


def read_modelfile(text):
    """Read instructions by Ollama's rules: a value ends at a line break outside quotes, and quotes have no escapes."""
    values, rest = {}, text
    while rest:
        instruction, _, rest = rest.partition(" ")
        if instruction == "PARAMETER":
            instruction, _, rest = rest.partition(" ")
        assert re.fullmatch(r"FROM|[a-z_]+", instruction)
        lines = rest.split("\n")
        for count in range(1, len(lines) + 1):
            value = "\n".join(lines[:count]).strip(" \t")
            quotes = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
            if len(value) >= 2 * len(quotes) and value.endswith(quotes):
                break
        values[instruction] = value[len(quotes) : len(value) - len(quotes)]
        rest = "\n".join(lines[count:])
    return values


def test_without_a_token_for_the_end():
    assert read_modelfile(modelfile(512, None)) == {"FROM": "./model.gguf", "num_ctx": "512"}
