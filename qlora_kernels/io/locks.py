"""Advisory locks between processes, by flock. Where the system has none (Windows) nothing waits.

A lock belongs to an open file description, so it ends with the process that holds it, however that process ends. On a
file system without flock (Lustre by default, NFS for folders, some FUSE drives) a file in the machine's temporary
folder is locked instead: this keeps the user's processes on one machine apart, and not those of several machines.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def release(descriptor: int | None) -> None:
    """Gives the lock back, and closes the descriptor: closing alone leaves it with children forked meanwhile."""
    if fcntl is None or descriptor is None:
        return
    with suppress(OSError):  # no locks there
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock on the folder that is at this path, waiting for it. Raises FileNotFoundError where there is none.

    shared: together with others that share it.
    """
    while True:
        descriptor = open_for_lock(folder)
        try:
            if not _wait(descriptor, shared):
                break
            if descriptor is None or _is_at(descriptor, folder):
                yield
                return
        finally:  # also where another folder has taken this one's place meanwhile
            release(descriptor)
    with name_lock(_substitute(folder)):
        yield


@contextmanager
def held_alone(folder: Path) -> Iterator[bool]:
    """Holds the lock on an existing folder if no other process does. Yields whether that is so, at once."""
    descriptor = open_for_lock(folder)
    try:
        yield try_lock(descriptor) is not False
    finally:
        release(descriptor)


@contextmanager
def name_lock(path: Path) -> Iterator[None]:
    """Holds the lock on a name, waiting for it; the file at `path` exists for that time only."""
    if fcntl is None:
        yield
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            supported = _wait(descriptor, shared=False)
            if not supported or _is_at(descriptor, path):
                break
        except BaseException:
            release(descriptor)
            raise
        release(descriptor)  # its former holder removed the file: another one has the name by now
    try:
        if supported or path.parent == _substitutes():
            yield
        else:
            with name_lock(_substitute(path)):
                yield
    finally:
        path.unlink(missing_ok=True)
        release(descriptor)


def _substitutes() -> Path:
    return Path(tempfile.gettempdir())


def _substitute(path: Path) -> Path:
    """A name in the temporary folder to lock in place of `path`, which lies on a file system without locks."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return _substitutes() / f"qlora_kernels-{user}-{digest}.lock"


def _wait(descriptor: int | None, shared: bool) -> bool:
    """Takes the lock. Returns False where the file system has no locks."""
    if fcntl is None or descriptor is None:
        return True
    try:
        if shared:  # NFS gives read-only descriptors, as those of folders are, this kind alone: no lock against writers
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
