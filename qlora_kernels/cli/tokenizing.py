"""A model's tokenizer and chat template at work under a time limit.

Both come out of files and are programs: a template may loop for ever, and the regular expressions of a tokenizer
backtrack. No signal interrupts a tokenizer's native code. So the work runs in a thread of its own, which is given up
where one text takes too long.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..training import Chat, Completion, Plain
from .arguments import UsageError

SECONDS = 30.0
"""For one text; a sound template or tokenizer takes milliseconds."""
CHARACTERS_PER_SECOND = 20_000
"""What each second more allows; tokenizers read some hundred thousand."""

Record = Plain | Completion | Chat
T = TypeVar("T")


class Clock:
    """When the text that is being tokenized must be done."""

    def __init__(self) -> None:
        self.begin("the text", 0)

    def begin(self, what: str, characters: int) -> None:
        """The next text begins.   what: its name, for the message."""
        self.what, self.seconds = what, SECONDS + characters / CHARACTERS_PER_SECOND
        self.deadline = time.monotonic() + self.seconds

    def each(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records, each of which begins when it is taken."""
        for record in records:
            self.begin(record.place or "a record", _characters(record))
            yield record


def within_time(work: Callable[[Clock], T]) -> T:
    """work(clock), which tells the clock of each text.

    Raises what it raises; UsageError where a text takes too long and where native code of the tokenizer fails.
    """
    clock, done = Clock(), threading.Event()
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(clock), None))
        except BaseException as error:  # also the panic of native code, which is no Exception
            outcome.append((None, error))
        done.set()

    with _native_messages() as messages:
        threading.Thread(target=run, daemon=True).start()
        while not done.wait(0.2):
            if time.monotonic() > clock.deadline:
                raise UsageError(
                    f"{clock.what}: must be tokenized within {clock.seconds:.0f} s; the chat template (a loop?) or a "
                    "regular expression of the tokenizer takes longer: use the model's original tokenizer files"
                )
        value, error = outcome[0]
        if type(error).__name__ == "PanicException":
            messages.clear()
            raise UsageError(
                f"{clock.what}: the tokenizer must be able to read it, got {' '.join(str(error).split())[:200]!r}; a "
                "regular expression in tokenizer.json may backtrack too far: use the model's original tokenizer files"
            ) from error
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _characters(record: Record) -> int:
    if isinstance(record, Plain):
        return len(record.text)
    if isinstance(record, Completion):
        return len(record.prompt) + len(record.completion)
    return sum(len(str(part)) for part in (*record.messages, *record.tools))


class _Messages:
    """What was written to stderr meanwhile."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def clear(self) -> None:
        self.file.seek(0)
        self.file.truncate()


@contextmanager
def _native_messages() -> Iterator[_Messages]:
    """Holds back what is written to stderr until the end, so that a panic's stack trace can be left out."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        try:
            stderr = os.dup(2)
        except OSError:  # stderr is closed
            yield _Messages(file)
            return
        os.dup2(file.fileno(), 2)
        try:
            yield _Messages(file)
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            file.seek(0)
            while chunk := file.read(1 << 16):
                os.write(stderr, chunk)
            os.close(stderr)
