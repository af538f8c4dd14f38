"""Atomic exchange of two paths: renameat2 of Linux, renamex_np of macOS."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h of macOS

_NOT_POSSIBLE = {
    errno.EBUSY,  # a mount point
    errno.EINVAL,  # the file system does not support it
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EXDEV,  # a folder of a lower layer of overlayfs
}


def exchange(first: Path, second: Path) -> bool:
    """Exchange two existing paths of one file system. Returns False, with nothing changed, if the system cannot.

    Raises OSError for every other failure, such as a missing path.
    """
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_POSSIBLE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


@cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if (renameat2 := getattr(library, "renameat2", None)) is not None:
        at = ctypes.c_int(_AT_FDCWD)
        return lambda a, b: int(renameat2(at, ctypes.c_char_p(a), at, ctypes.c_char_p(b), _RENAME_EXCHANGE))
    if (renamex_np := getattr(library, "renamex_np", None)) is not None:
        return lambda a, b: int(renamex_np(ctypes.c_char_p(a), ctypes.c_char_p(b), _RENAME_SWAP))
    return None
