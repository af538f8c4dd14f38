"""Tries regular expressions of options and adapter files under a time limit before they are used.

Python's `re` backtracks, so that a pattern such as (a|a)*b can take hours on the name of one module.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from torch import nn

from ..nn.match import matches, matches_ending, number_after
from ..peft import PeftConfig
from .arguments import UsageError

SECONDS = 2.0
"""Seconds of CPU time for all names of a model; ordinary patterns take microseconds for each."""


def check_patterns(config: PeftConfig, model: nn.Module) -> None:
    """Raise UsageError if a regular expression of `config` is malformed or too slow on the names of `model`."""
    names = [name for name, _ in model.named_modules()]
    for field, pattern, match in _patterns(config):
        try:
            with _time_limit(SECONDS):
                for name in names:
                    match(name)
        except ValueError as error:
            why = error.__cause__ or error
            raise UsageError(f"{field}: must be a regular expression, got {pattern[:60]!r} ({why})") from error
        except TimeoutError as error:
            raise UsageError(
                f"{field}: must match the model's {len(names)} names within {SECONDS:g} s, got {pattern[:60]!r}; "
                "repeat no group that itself repeats or has alternatives"
            ) from error


def _patterns(config: PeftConfig) -> Iterator[tuple[str, str, Callable[[str], Any]]]:
    """Return (field, expression, function that matches a name) of each regular expression of the configuration."""
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field, None)
        if isinstance(value, str):
            yield field, value, partial(matches, value)
    layers = getattr(config, "layers_pattern", None) or ()
    for value in (layers,) if isinstance(layers, str) else layers:
        yield "layers_pattern", value, partial(number_after, value)
    for field in ("rank_pattern", "alpha_pattern"):
        for value in getattr(config, field, None) or ():
            yield field, value, partial(matches_ending, value)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block when it has used this much CPU time, which is independent of other programs.

    Only the main thread on POSIX systems can be interrupted; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
