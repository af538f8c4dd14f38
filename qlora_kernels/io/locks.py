"""Advisory locks between processes, by flock. Where the system has none (Windows, some network drives) nothing waits.

A lock belongs to an open file description, so it ends with the process that holds it, however that process ends.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NOT_SUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def open_for_lock(path: Path) -> int | None:
    """A descriptor of a folder or file to lock; None where the system has no locks on it."""
    return None if fcntl is None else os.open(path, os.O_RDONLY)


def try_lock(descriptor: int | None) -> bool | None:
    """Takes the lock without waiting: True; False if another process holds it; None where locks are not supported."""
    if fcntl is None or descriptor is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return None
        raise
    return True


@contextmanager
def folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock on an existing folder, waiting for it.   shared: together with others that share it."""
    descriptor = open_for_lock(folder)
    try:
        _wait(descriptor, shared)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def held_alone(folder: Path) -> Iterator[bool]:
    """Holds the lock on an existing folder if no other process does. Yields whether that is so, at once."""
    descriptor = open_for_lock(folder)
    try:
        yield try_lock(descriptor) is not False
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def name_lock(path: Path) -> Iterator[None]:
    """Holds the lock on a name, waiting for it; the file at `path` exists for that time only."""
    if fcntl is None:
        yield
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait(descriptor, shared=False)
            if _is_at(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its former holder removed the file: another one has the name by now
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _wait(descriptor: int | None, shared: bool) -> None:
    if fcntl is None or descriptor is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
