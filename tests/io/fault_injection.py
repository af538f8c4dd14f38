"""Runs an action in a child process with a fault at its n-th file operation.

A file operation is an event of Python's audit hooks (open, mkdir, rename, remove, ...), an fsync, or an exchange of two
paths. The fault occurs before the operation, so that the fault after operation n is the one before n + 1.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from enum import Enum

from qlora_kernels.io import atomic

WRITES = {"os.mkdir", "os.rename", "os.fsync", "exchange"}
OPERATIONS = WRITES | {
    "open",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "os.truncate",
    "os.chmod",
    "fcntl.flock",
}


class Fault(Enum):
    """The fault at operation n."""

    KILL = "SIGKILL"
    TERMINATE = "SIGTERM"
    INTERRUPT = "SIGINT"
    ERROR = "an I/O error, once"
    FULL = "disk full from there on"
    READ_ONLY = "read-only from there on"


SIGNALS = {Fault.KILL: signal.SIGKILL, Fault.TERMINATE: signal.SIGTERM, Fault.INTERRUPT: signal.SIGINT}
ERRORS = {Fault.ERROR: errno.EIO, Fault.FULL: errno.ENOSPC, Fault.READ_ONLY: errno.EROFS}


def hit(action: Callable[[], object], fault: Fault, n: int) -> bool:
    """Run `action` in a child. Returns whether it had an n-th operation, counted from 1.

    Raises AssertionError if the action ended in anything but the fault or success.
    """
    reached, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reached)
        os._exit(_child(action, fault, n, write_end))
    os.close(write_end)
    was_reached = os.read(reached, 1) != b""
    os.close(reached)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == SIGNALS[fault], f"died of signal {os.WTERMSIG(status)}"
    else:
        assert os.WEXITSTATUS(status) == 0, f"{fault} at operation {n}: see the traceback above"
    return was_reached


def every_point(action: Callable[[], object], fault: Fault, *, step: int = 1) -> Iterator[int]:
    """Yield 1, 2, ... after a run of `action` with a fault at that operation; ends after a run without a fault."""
    n = 1
    while hit(action, fault, n):
        yield n
        n += step


def limited(action: Callable[[], object], most_bytes: int) -> bool:
    """Runs `action` in a child that cannot write files beyond `most_bytes`, as on a full disk. Returns whether it ended
    with the system's error."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        try:
            action()
        except Exception as error:
            os._exit(1 if "File too large" in str(error) else 2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1), f"ended with {code}"
    return code == 1


def _child(action: Callable[[], object], fault: Fault, n: int, report: int) -> int:
    count = 0

    def operation(name: str, *arguments: object) -> None:
        nonlocal count
        if name not in OPERATIONS:
            return
        count += 1
        if count == n:
            os.write(report, b"x")
            if fault in SIGNALS:
                os.kill(os.getpid(), SIGNALS[fault])
        persists = fault in (Fault.FULL, Fault.READ_ONLY)
        writes = name in WRITES or (name == "open" and _opens_for_writing(arguments))
        if (count == n and fault is Fault.ERROR) or (persists and count >= n and writes):
            raise OSError(ERRORS[fault], os.strerror(ERRORS[fault]))

    def before(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object) -> object:
            operation(name)
            return function(*arguments)

        return wrapped

    # The parent may ignore signals, as background jobs of a shell ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.fsync = before("os.fsync", os.fsync)
    atomic.exchange = before("exchange", atomic.exchange)
    sys.addaudithook(lambda name, arguments: operation(name, *arguments))
    try:
        action()
    except KeyboardInterrupt:
        return 0 if fault is Fault.INTERRUPT else 3
    except OSError as error:
        if error.errno == ERRORS.get(fault) or any(os.strerror(code) in str(error) for code in ERRORS.values()):
            return 0
        traceback.print_exc()
        return 4
    except BaseException:
        traceback.print_exc()
        return 5
    return 0


def _opens_for_writing(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
