"""Chat templates and tokenizers that do not terminate, or fail in native code, end a command with one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from qlora_kernels.cli import main, tokenizing
from qlora_kernels.cli.arguments import UsageError
from qlora_kernels.training import Chat, Completion, Plain
from tests.support.tiny_model import write_jsonl, write_tiny_llama

ENDLESS = "{% for i in range(10**4) %}{% for j in range(10**4) %}{% for k in range(10**4) %}{% endfor %}{% endfor %}"
ENDLESS += "{% endfor %}"
MANY = "{% for i in range(10**9) %}{% endfor %}"
BACKTRACKING = "(a+)+b"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def with_template(model, folder, template):
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def with_pattern(model, folder, pattern):
    shutil.copytree(model, folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, values["pre_tokenizer"]]}
    path.write_text(json.dumps(values))
    return folder


def refused(capfd, model, command, *more) -> str:
    capfd.readouterr()
    assert main([command, "--model", str(model), *map(str, more)]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, lines
    return lines[0]


def chats(folder):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    return write_jsonl(folder / "chats.jsonl", [{"messages": turns}] * 4)


def test_an_endless_template_ends_the_command(model, tmp_path):
    """Runs in a separate process, because an abandoned thread continues until the process ends."""
    folder = with_template(model, tmp_path / "model", ENDLESS)
    code = "import sys; from qlora_kernels.cli import main, tokenizing; tokenizing.SECONDS = 2.0; "
    code += "sys.exit(main(sys.argv[1:]))"
    finetune = ["finetune", "--model", folder, "--data", chats(tmp_path), "--out", tmp_path / "out", "--unseen", 0]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, finetune)], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 2, run.stderr
    line = run.stderr.splitlines()[-1]
    assert "chats.jsonl:1: must be tokenized within 2 s; the chat template (a loop?)" in line
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_template_with_too_long_a_range_is_refused(capfd, model, tmp_path):
    folder = with_template(model, tmp_path / "model", MANY)
    line = refused(capfd, folder, "finetune", "--data", chats(tmp_path), "--out", tmp_path / "out")
    assert "chats.jsonl:1: the chat template refuses the conversation: Range too big" in line
    line = refused(capfd, folder, "generate", "--dense", "--prompt", "hello", "--chat")
    assert "the chat template refuses the conversation: Range too big" in line


def test_backtracking_pattern_is_refused(capfd, model, tmp_path):
    folder = with_pattern(model, tmp_path / "model", BACKTRACKING)
    rows = [{"prompt": "count ", "completion": f"{'a' * i}!"} for i in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = refused(capfd, folder, "finetune", "--data", data, "--out", tmp_path / "out", "--unseen", 0)
    assert "the tokenizer must be able to read it, got 'Onig: Regex search error: retry-limit-in-match over'" in line
    line = refused(capfd, folder, "generate", "--dense", "--prompt", "a" * 60 + "!")
    assert "the tokenizer must be able to read it" in line


def test_more_time_for_longer_texts(monkeypatch):
    monkeypatch.setattr(tokenizing, "SECONDS", 1.0)
    clock = tokenizing.Clock()
    chat = Chat(({"role": "user", "content": "x" * 40_000},), place="rows:3")
    for record, at_least in ((Plain("x" * 20_000), 2), (Completion("x" * 20_000, "x" * 20_000), 3), (chat, 3)):
        assert list(clock.timed([record])) == [record]
        assert at_least <= clock.seconds < at_least + 0.1
    assert clock.what == "rows:3"


def test_exceptions_and_output_of_work_are_kept(capfd):
    def work(clock):
        sys.stderr.write("a warning\n")
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        tokenizing.within_time(work)
    assert capfd.readouterr().err == "a warning\n"
    assert tokenizing.within_time(lambda clock: 3) == 3


@pytest.fixture
def now(monkeypatch):
    """The clocks of tokenizing: they stand still unless a test changes them. `looks` counts the reads of both."""
    now = SimpleNamespace(passed=0.0, used=0.0, looks=threading.Semaphore(0))

    def process_time():
        now.looks.release()
        return now.used

    monkeypatch.setattr(tokenizing, "time", SimpleNamespace(monotonic=lambda: now.passed, process_time=process_time))
    return now


def test_the_record_is_named(now):
    """Record b takes longer than its time."""
    records = [Plain("a", place="rows:1"), Plain("b", place="rows:2")]
    refused = threading.Event()

    def work(clock):
        for record in clock.timed(records):
            if record.text == "b":
                now.passed += 1000.0
                now.used += 1000.0
                refused.wait()

    with pytest.raises(UsageError, match=r"rows:2: must be tokenized within 30 s"):
        tokenizing.within_time(work)
    refused.set()


@pytest.mark.parametrize("clock", ["passed", "used"])
def test_stopped_process_and_spinning_threads_refuse_no_text(now, clock):
    """A stopped process (Ctrl-Z) uses no CPU time, and threads that spin use more of it than passes."""

    def work(_):
        setattr(now, clock, 1000.0)
        while now.looks.acquire(blocking=False):  # earlier reads
            pass
        return now.looks.acquire(timeout=120) and now.looks.acquire(timeout=120)

    assert tokenizing.within_time(work)
