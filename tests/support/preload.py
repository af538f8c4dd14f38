"""The environment in which the dynamic loader loads a library before all others."""

from __future__ import annotations

import os
from pathlib import Path


def with_preloaded(library: Path) -> dict[str, str]:
    """Return this process's environment with `library` in LD_PRELOAD.

    ld.so splits LD_PRELOAD at blanks, which the path of a checkout may hold. The variable therefore holds the file's
    name, which ld.so looks up in the folders of LD_LIBRARY_PATH; that one is split at colons and semicolons only.
    """
    folders = [str(library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_PRELOAD": library.name, "LD_LIBRARY_PATH": ":".join(folders)}
