"""Signals that end a command, and those that stop a training run after its step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
"""SIGINT (Ctrl-C), SIGTERM (schedulers, `kill`) and SIGHUP (closed terminal), which Windows lacks."""


class Interrupt:
    """The signal that arrived while signals were deferred; calling it returns whether there is one.

    number: the first signal that arrived since `deferred` began, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self.number is not None

    @property
    def name(self) -> str:
        """Return the signal's name; another process may have got it instead of this one."""
        return "a signal" if self.number is None else signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """Return the exit code of a process that this signal ends, as shells give it."""
        return 128 + (signal.SIGTERM if self.number is None else self.number)


@contextmanager
def deferred(message: str) -> Iterator[Interrupt]:
    """Record the first signal inside the block and print `message`; a second signal ends the process as usual.

    Signals that the process ignores (nohup, a job in the background) stay ignored. Only the main thread can set signal
    handlers, so nothing is recorded in another thread.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before: dict[int, Any] = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}

    def note(number: int, _frame: FrameType | None) -> None:
        interrupt.number = number
        _restore(before, note)
        # Not through sys.stderr, because the signal may have interrupted a write to its buffer.
        os.write(2, f"\n{signal.Signals(number).name}: {message}\n".encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        _restore(before, note)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the command, as Ctrl-C does, so that it removes its scratch folders.

    Raises SystemExit, with exit code 143, where the signal arrives.
    """

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers can only be set in the main thread
        return
    before: dict[int, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, end)}
    try:
        yield
    finally:
        _restore(before, end)


def _restore(before: Mapping[int, Any], handler: Callable[[int, FrameType | None], object]) -> None:
    """Set the handlers `before` again for the signals that `handler` still handles.

    Another handler stays: SIGTERM is ignored from the loss of another process on (training/lost_workers.py).
    """
    for number, former in before.items():
        if signal.getsignal(number) is handler:
            signal.signal(number, signal.SIG_DFL if former is None else former)
