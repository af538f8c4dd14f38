"""Files and folders that appear by rename: whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
"""How the names of files that are being written begin; a process that is killed leaves them behind."""


@contextmanager
def folder_appearing_by_rename(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill, which takes its place at the end and vanishes where filling it raises.

    A folder already at `path` is replaced, and is whole until then. One process at a time writes to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            # A folder cannot be renamed onto one that holds files.
            replaced = path.with_name(f".{path.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(path, replaced)
            os.rename(partial, path)
            shutil.rmtree(replaced)
        else:
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def file_appearing_by_rename(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to, whose file takes its place at the end and vanishes where writing raises.

    durable: the file is on disk before it gets its name, and the name is when this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keeps the suffix, by which writers choose the format; of this process, so that several may write one file.
    partial = path.with_name(f"{PARTIAL}{os.getpid()}.{path.name}")
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        _sync(path.parent)


@contextmanager
def file_vanishing(path: Path) -> Iterator[None]:
    """Removes a file at the end, if there is one, and keeps it where the block raises."""
    yield
    path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
