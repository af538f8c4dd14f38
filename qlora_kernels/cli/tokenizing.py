"""Runs a model's tokenizer and chat template under a time limit.

Both come from files and are programs: a template may loop forever, and a tokenizer's regular expressions may backtrack.
No signal interrupts a tokenizer's native code. The work therefore runs in a separate thread, which is abandoned if one
text takes too long.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ..training import Chat, Completion, Plain
from ..training.text_tokens import Tokenizer
from .arguments import UsageError

SECONDS = 30.0
"""Seconds for one text, of the clock and of the process's CPU time; ordinary templates and tokenizers take
milliseconds."""
CHARACTERS_PER_SECOND = 20_000
"""Characters for each further second; tokenizers process some hundred thousand."""

Record = Plain | Completion | Chat
T = TypeVar("T")


class ModelTokenizer(Tokenizer, Protocol):
    """The tokenizer of a model folder: what the commands use beside `Tokenizer`."""

    vocab_size: int
    pad_token_id: int | None

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Return the token of one id."""


class Clock:
    """The time of the text that is being tokenized.

    seconds: the limit.   spent: seconds so far, the smaller of those that have passed and those of CPU time. A process
    that is stopped, or waits for a CPU or a disk, uses no CPU time, and threads that spin use more of it than passes.
    """

    def __init__(self) -> None:
        self.begin("the text", 0)

    def begin(self, what: str, characters: int) -> None:
        """Start the time of the next text. what: its name, for the message."""
        self._started = time.monotonic(), time.process_time()  # first, because another thread reads `spent`
        self.what, self.seconds = what, SECONDS + characters / CHARACTERS_PER_SECOND

    @property
    def spent(self) -> float:
        """Return the seconds that the text has taken."""
        passed, used = self._started
        return min(time.monotonic() - passed, time.process_time() - used)

    def timed(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records; the time of each starts when it is taken."""
        for record in records:
            self.begin(record.place or "a record", _characters(record))
            yield record


def within_time(work: Callable[[Clock], T]) -> T:
    """Return the result of work(clock), which calls clock.begin for each text.

    Raises the errors of `work`, and UsageError if a text takes too long or native code of the tokenizer fails.
    """
    clock, done = Clock(), threading.Event()
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(clock), None))
        except BaseException as error:  # also panics of native code, which are not Exceptions
            outcome.append((None, error))
        done.set()

    with _native_messages() as messages:
        threading.Thread(target=run, daemon=True).start()
        while not done.wait(0.2):
            if clock.spent > clock.seconds:
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
    """The text that was written to stderr in the block."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def clear(self) -> None:
        self.file.seek(0)
        self.file.truncate()


@contextmanager
def _native_messages() -> Iterator[_Messages]:
    """Hold back output to stderr until the end of the block, so that a panic's stack trace can be left out."""
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
