"""Advisory locks between processes, by flock. On systems without it (Windows), nothing is locked.

A lock belongs to an open file description and ends with its process, however that process ends. On a file system
without flock (Lustre by default, NFS for folders, some FUSE drives), a file in the machine's temporary folder is locked
instead, which excludes the user's processes on the same machine but not those of other machines.
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
    """Return a descriptor of a folder or file to lock, or None if the system has no locks on it."""
    return None if fcntl is None else os.open(path, os.O_RDONLY)


def try_lock(descriptor: int | None) -> bool | None:
    """Take the lock without waiting. Returns True; False if another process holds it; None without lock support."""
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
    """Release the lock and close the descriptor; only closing would leave the lock with forked children."""
    if fcntl is None or descriptor is None:
        return
    with suppress(OSError):  # the file system has no locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait for the lock on the folder at `path` and hold it. Raises FileNotFoundError if there is no folder.

    shared: several holders may share the lock.
    """
    while True:
        descriptor = open_for_lock(folder)
        try:
            if not _wait(descriptor, shared):
                break
            if descriptor is None or _is_at(descriptor, folder):
                yield
                return
        finally:  # also if another folder has replaced this one in the meantime
            release(descriptor)
    with name_lock(_substitute(folder)):
        yield


@contextmanager
def held_alone(folder: Path) -> Iterator[bool]:
    """Take the lock on an existing folder without waiting, and yield whether it was free."""
    descriptor = open_for_lock(folder)
    try:
        yield try_lock(descriptor) is not False
    finally:
        release(descriptor)


@contextmanager
def name_lock(path: Path) -> Iterator[None]:
    """Wait for the lock on a name and hold it; the file at `path` exists only during this time."""
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
        release(descriptor)  # the former holder removed the file, so the name may belong to another file now
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
    """Return a name in the temporary folder to lock instead of `path`, whose file system has no locks."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return _substitutes() / f"qlora_kernels-{user}-{digest}.lock"


def _wait(descriptor: int | None, shared: bool) -> bool:
    """Wait for the lock. Returns False if the file system has no locks."""
    if fcntl is None or descriptor is None:
        return True
    try:
        if shared:  # on NFS, read-only descriptors, as for folders, allow only shared locks, which keep out no writer
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
