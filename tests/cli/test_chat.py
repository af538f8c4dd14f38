"""chat: turns from standard input, answers in the chat template, commands, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal

import pytest
import torch

from qlora_kernels.cli import main
from qlora_kernels.cli.generate import continuation
from qlora_kernels.cli.streaming import AnswerStream, Interrupted
from qlora_kernels.integrations.model_folders import load_model, load_tokenizer
from tests.support.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def chat(capsys, monkeypatch, model, lines, *options) -> tuple[list[str], str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert main(["chat", "--model", str(model), "--dense", "--max-new-tokens", "5", "--json", *options]) == 0
    captured = capsys.readouterr()
    return [json.loads(line)["content"] for line in captured.out.splitlines()], captured.err


def test_answers_follow_the_conversation(capsys, monkeypatch, model):
    lines = ["hello", "", "and now", "/reset", "hello", "/exit", "never"]
    answers, errors = chat(capsys, monkeypatch, model, lines, "--system", "be brief")
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    opening = "<system>be brief\n<user>hello\n<assistant>"
    first = continuation(loaded, tokenizer, opening, 5, from_template=True)
    second_turn = f"{opening}{first}\n<user>and now\n<assistant>"
    second = continuation(loaded, tokenizer, second_turn, 5, from_template=True)
    assert answers == [first, second, first]
    assert errors == ""


def test_text_is_streamed_and_sampling_repeats(capsys, monkeypatch, model):
    texts = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        options = ["--temperature", "1", "--seed", "3", "--max-new-tokens", "6", "--dense"]
        assert main(["chat", "--model", str(model), *options]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert "/reset starts a new conversation" in captured.err
    assert texts[0] == texts[1] != ""
    assert texts[0].endswith("\n")


def test_the_stream_writes_every_character_once():
    class Tokenizer:
        def decode(self, ids, **options):
            return "".join("one two\n"[i] for i in ([ids] if isinstance(ids, int) else ids))

    written = io.StringIO()
    stream = AnswerStream(Tokenizer(), written)
    stream.put(torch.tensor([[0, 1, 2]]))  # the prompt
    for i in range(8):
        stream.put(torch.tensor([i]))
    stream.end()
    assert stream.text == "one two\n"
    assert written.getvalue() == "one two\n\n"


def test_ctrl_c_ends_an_answer_and_not_the_command():
    before = signal.getsignal(signal.SIGINT)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with Interrupted() as interrupted:
        assert not interrupted(ids, None).any()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted(ids, None).all()
    assert signal.getsignal(signal.SIGINT) is before


def test_turn_without_room_for_answer_is_reported_and_skipped(capsys, monkeypatch, model):
    answers, errors = chat(capsys, monkeypatch, model, ["x" * 300, "hello"])
    assert "positions and leaves none for an answer; /reset" in errors
    assert len(answers) == 1


def test_refused(capsys, monkeypatch, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert main(["chat", "--model", str(folder), "--dense"]) == 2
    assert "the tokenizer must have a chat template" in capsys.readouterr().err
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    )
    assert main(["chat", "--model", str(folder), "--dense", "--system", "be brief"]) == 2
    error = capsys.readouterr().err
    assert "no system role" in error.splitlines()[-1]
