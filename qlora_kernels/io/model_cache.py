"""Folders of derived models, named by what they were derived from: <kind>-<16 hex digits>.

The digits are of the source's contents and of the settings, so a changed file or setting is another folder and nothing
is ever stale. A folder that is there is complete, because it appears by rename.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from .atomic import folder_appearing_by_rename


def cached_folder(
    cache: Path, kind: str, source: Path, settings: Mapping[str, object], make: Callable[[Path], object]
) -> tuple[Path, bool]:
    """(the folder, whether it was there already).   make: fills an empty folder.

    source: a file, or a folder whose files are all of the source.
    """
    folder = cache / f"{kind}-{_key(source, settings)}"
    if folder.is_dir():
        return folder, True
    with folder_appearing_by_rename(folder) as partial:
        make(partial)
    return folder, False


def _key(source: Path, settings: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    for path in files:
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
