"""Private staging folders for files that are written before they are published, and removal of abandoned ones.

A staging folder is called `.partial-<random>.<name>` and is beside or in its target, so that a rename moves its
contents. Its owner holds a lock on it; a staging folder that can be locked belongs to no running process.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .locks import open_for_lock, release, try_lock

PARTIAL = ".partial-"
_ABANDONED_AFTER = 24 * 3600.0
"""Age in seconds from which a staging folder is considered abandoned on file systems without locks."""


@contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder inside `parent` that no other process uses; it is removed at the end if it still exists.

    name: of the target; part of the folder's name. Staging folders that dead processes left in `parent` are removed.
    """
    remove_abandoned(parent)
    path, descriptor = _new(parent, name)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        release(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Remove the staging folders of dead processes in `parent`. Never raises, because leftovers only take space."""
    try:
        found = [Path(entry.path) for entry in os.scandir(parent) if entry.name.startswith(PARTIAL)]
    except OSError:
        return
    for path in found:
        try:
            if path.is_dir():
                _remove_if_unlocked(path)
            elif _is_old(path):
                path.unlink()
        except OSError:
            continue


def _new(parent: Path, name: str) -> tuple[Path, int | None]:
    while True:
        path = parent / f"{PARTIAL}{secrets.token_hex(4)}.{name[:100]}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        try:
            descriptor = open_for_lock(path)
        except FileNotFoundError:
            continue  # another process removed it as abandoned between the two calls
        if try_lock(descriptor) is not False and path.is_dir():
            return path, descriptor
        release(descriptor)


def _remove_if_unlocked(path: Path) -> None:
    descriptor = open_for_lock(path)
    try:
        free = try_lock(descriptor)
        if free or (free is None and _is_old(path)):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        release(descriptor)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _ABANDONED_AFTER
