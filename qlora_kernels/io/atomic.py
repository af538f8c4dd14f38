"""Atomic publication of files and folders: a reader always finds either the complete old or the complete new state.

Data is written to a private staging folder and flushed to the disk. It is then put in place in one step:

- a file by rename;
- a new folder by rename; a folder that replaces another by an exchange of the two (exchange.py);
- several files of a folder that also holds other files, and folders on systems without an exchange, by a commit. The
  staging folder is renamed to `.commit-<random>` inside the target, and from then on defines the target's content.
  First the former files are removed, then the new ones are moved to their names, so that no reader finds old files
  beside new ones. If the process is killed in between, the commit stays; `settle`, which readers and writers of this
  package call first, completes it.

Concurrent writers do not disturb each other; the last one to publish wins. Staging folders of killed writers are
removed by the next save.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .exchange import exchange
from .json_file import read_json_object
from .locks import folder_lock
from .staging import PARTIAL, remove_abandoned, staging

COMMIT = ".commit-"
_FILES, _REMOVED = "files", "removed.json"


@contextmanager
def file_appearing_by_rename(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to. At the end it replaces `path`; if the block raises, it is removed."""
    make_folder(path.parent)
    with staging(path.parent, path.name) as private:
        partial = private / path.name  # keeps the suffix, because writers choose the format by it
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)


@contextmanager
def folder_appearing_by_rename(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill. At the end it replaces `path`; if the block raises, it is removed.

    replace: replace an existing folder as a whole; if False, an existing folder raises FileExistsError.
    """
    path = Path(os.path.realpath(path))
    make_folder(path.parent)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} must be a folder, it is a file")
    with staging(path.parent, path.name) as private:
        partial = private / path.name
        partial.mkdir()
        yield partial
        _sync_tree(partial)
        while not _move(partial, path):
            if not replace:
                raise FileExistsError(f"{path} must not exist; another process has made it")
            if _exchange(partial, path):
                break
            if path.exists():  # still there, so the system cannot exchange folders
                remove_abandoned(path)
                _commit(private, partial, path, None)
                break
        _sync(path.parent)


@contextmanager
def files_appearing_together(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to fill with files, which all become files of `folder` in one commit.

    names: files, relative to the folder, that are removed unless they are written. All other files are kept.
    Raises FileNotFoundError if another process has removed or replaced `folder` meanwhile.
    """
    folder = Path(os.path.realpath(folder))
    make_folder(folder)
    with staging(folder, folder.name) as private:
        partial = private / _FILES
        partial.mkdir()
        made = os.stat(private)
        yield partial
        if not (private.exists() and os.path.samestat(made, os.stat(private))):
            raise FileNotFoundError(
                f"{folder} must stay while files are written into it, another process has replaced or removed it; "
                "save again"
            )
        _sync_tree(partial)
        _commit(private, partial, folder, names)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Block other processes of this package from replacing `folder` or its files, if the system has locks.

    First a commit that a killed process left is completed. If there is no folder, nothing is locked.
    """
    while folder.is_dir():
        settle(folder)
        with ExitStack() as lock:
            try:
                lock.enter_context(folder_lock(folder, shared=True))
            except FileNotFoundError:  # the folder was removed after the loop's condition was evaluated
                continue
            if not _commits(folder):  # a writer may have been killed during a commit before the lock was taken
                yield
                return
    yield


def settle(folder: Path) -> None:
    """Complete the commits in `folder` that killed processes left; do nothing if there is no such folder.

    Raises OSError if the folder cannot be written to, and ValueError for a commit with paths outside it.
    """
    if not _commits(folder):
        return
    try:
        with folder_lock(folder):
            _settle_locked(folder)
    except FileNotFoundError:  # raised by the lock: another process has removed the folder
        return


def _settle_locked(folder: Path) -> None:
    """Complete the commits of a folder whose lock the caller holds."""
    try:
        for commit in _commits_in_order(folder):
            _apply(commit, folder)
    except OSError as error:
        raise OSError(
            f"{folder}: a save into this folder was interrupted and must be completed before it is read, which "
            f"failed ({error.strerror or error}); make the folder writable"
        ) from error


def _move(partial: Path, path: Path) -> bool:
    """Move a folder to an unused path. Returns False if the path is in use."""
    if path.exists():
        return False
    try:
        os.rename(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _exchange(partial: Path, path: Path) -> bool:
    """Exchange two folders once no reader is in `path`. Returns False if the system cannot, or `path` does not
    exist.
    """
    try:
        with folder_lock(path):
            shutil.copymode(path, partial)
            return exchange(partial, path)
    except FileNotFoundError:
        if path.exists():
            raise
        return False


def _commit(private: Path, partial: Path, folder: Path, names: Collection[str] | None) -> None:
    """Publish the files in `partial`, a folder in the staging folder `private`, as files of `folder`.

    names: files that are removed unless they are written; None: all files.
    """
    written = set(_files_below(partial))
    if partial.name != _FILES:
        os.rename(partial, private / _FILES)
    with folder_lock(folder):
        _settle_locked(folder)  # an older commit must not be completed after this one
        replaced = set(_files_below(folder) if names is None else names)
        _require_inside(folder, replaced | written)
        _require_room(folder, written, replaced)
        (private / _REMOVED).write_text(json.dumps({"names": sorted(replaced - written)}), encoding="utf-8")
        _sync(private / _REMOVED)
        _sync(private)
        commit = folder / (COMMIT + private.name.removeprefix(PARTIAL))
        os.rename(private, commit)  # from here on, the folder's content is the new files
        try:
            _sync(folder)
            _apply(commit, folder)
        except BaseException:  # an interrupt or a disk error: try once more, otherwise the next reader completes it
            with suppress(OSError):
                _apply(commit, folder)
            raise


def _apply(commit: Path, folder: Path) -> None:
    """Move the commit's files to their names. May be repeated after an interruption at any point."""
    waiting = _files_below(commit / _FILES)  # without the files that have moved already
    removed = _removed(commit)
    _require_inside(folder, [*removed, *waiting])
    for name in [*removed, *waiting]:
        (folder / name).unlink(missing_ok=True)
        _remove_empty(folder, (folder / name).parent)
    for name in waiting:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(commit / _FILES / name, folder / name)
        _sync((folder / name).parent)
    _sync(folder)
    (commit / _REMOVED).unlink(missing_ok=True)
    for place, _, _ in os.walk(commit, topdown=False, onerror=_raise):
        os.rmdir(place)  # fails without loss if a file is left


def _removed(commit: Path) -> list[str]:
    try:
        names = read_json_object(commit / _REMOVED).get("names")
    except FileNotFoundError:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{commit / _REMOVED}: names must be a list of strings")
    return names


def _require_inside(folder: Path, names: Collection[str]) -> None:
    """Raise unless all names of a commit stay inside `folder`, which may come from an untrusted source."""
    top = os.path.realpath(folder)
    for name in names:
        inside = Path(os.path.realpath((folder / name).parent)).is_relative_to(top)
        if Path(name).is_absolute() or ".." in Path(name).parts or not inside:
            raise ValueError(f"{folder}: a save must not write outside of it, got {name!r}")


def _require_room(folder: Path, written: Collection[str], replaced: Collection[str]) -> None:
    """Raise if a folder is in the place of a file to write, or a file in the place of a folder to make."""
    for name in written:
        path = folder / name
        if path.is_dir() and not {os.path.join(name, below) for below in _files_below(path)} <= set(replaced):
            raise IsADirectoryError(f"{path} must be a file, it is a folder")
        for above in path.parents[: len(Path(name).parts) - 1]:
            if above.is_file() and os.path.relpath(above, folder) not in replaced:
                raise NotADirectoryError(f"{above} must be a folder, it is a file")


def _commits(folder: Path) -> list[Path]:
    """Return the unfinished commits of `folder`; an empty list if there is no such folder.

    Without the lock on `folder`, commits may disappear at any time; only their names are valid then.
    """
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(COMMIT)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _commits_in_order(folder: Path) -> list[Path]:
    """Return the commits from oldest to newest. The caller holds the lock on `folder`."""
    found = _commits(folder)
    if links := [path for path in found if path.is_symlink() or (path / _FILES).is_symlink()]:
        raise ValueError(f"{links[0]} must not be, or hold, a link: no save makes one; remove it")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def _files_below(folder: Path) -> list[str]:
    """Return the names of all files below `folder`, relative to it, without those of unfinished writers."""
    names: list[str] = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith((PARTIAL, COMMIT))]
        names += [os.path.relpath(os.path.join(place, name), folder) for name in files]
    return sorted(names)


def _raise(error: OSError) -> None:
    """Raise an error of os.walk, which by default skips folders that it cannot list; ignore a missing folder."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _remove_empty(top: Path, folder: Path) -> None:
    """Remove `folder` and the folders above it up to `top` while they are empty."""
    while folder != top and folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
        folder = folder.parent


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises NotADirectoryError if one of them is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder} must be a folder; it, or a folder above it, is a file") from error


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder, topdown=False, onerror=_raise):
        for name in files:
            _sync(Path(place, name))
        _sync(Path(place))


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    is_folder = path.is_dir()
    if sys.platform == "win32" and is_folder:
        return  # Windows cannot flush folders
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):  # some network drives
            raise
    finally:
        os.close(descriptor)
