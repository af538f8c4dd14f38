"""Standard streams of a command that was started with some of them closed, or in a locale that lacks characters."""

from __future__ import annotations

import io
import os
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_standard_streams() -> None:
    """Connect closed standard streams to the null device, and let stdout escape what its encoding lacks.

    Python sets sys.stdin, sys.stdout or sys.stderr to None where the descriptor is closed (`>&-`, services, pythonw).
    The next file that the process opens gets the free number, so that a message of a native library would be written
    into that file. stderr escapes unknown characters by default; stdout raises UnicodeEncodeError.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name, mode in _STREAMS:
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it stays open)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
