"""Folders of derived models, named <kind>-<16 hex digits> by their source and settings.

The digits are a hash of the source's contents and the settings, so that a changed file or setting gives another folder,
and an entry is never stale. A folder lists its files with their sizes in `qlora_kernels_cache.json`. A folder that
lacks a file, or has one of another size, is made again. Processes that need the same folder at once wait for the first
one to make it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from .atomic import folder_appearing_by_rename, make_folder, settle
from .locks import name_lock
from .staging import remove_abandoned

MANIFEST = "qlora_kernels_cache.json"


def cached_folder(
    cache: Path, kind: str, source: Path, settings: Mapping[str, object], make: Callable[[Path], object]
) -> tuple[Path, bool]:
    """Return (the folder, whether it existed).   make: fills an empty folder.

    source: a file, or a folder, all of whose files belong to the source.
    """
    folder = cache / f"{kind}-{_key(source, settings)}"
    lock = cache / f".lock-{folder.name}"
    if _is_whole(folder):
        remove_abandoned(cache)
        with suppress(OSError):
            lock.unlink(missing_ok=True)  # left by a killed process; an existing folder is not made again
        return folder, True
    make_folder(cache)
    with name_lock(lock):
        if _is_whole(folder):
            return folder, True
        try:
            with folder_appearing_by_rename(folder, replace=folder.exists()) as partial:
                make(partial)
                (partial / MANIFEST).write_text(json.dumps(_sizes(partial), indent=2) + "\n", encoding="utf-8")
        except FileExistsError:  # without locks, another process may be first; this copy is discarded
            if not _is_whole(folder):
                raise
    return folder, False


def _is_whole(folder: Path) -> bool:
    settle(folder)
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(expected, dict) and expected.items() <= _sizes(folder).items()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def _key(source: Path, settings: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    for path in files:
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
