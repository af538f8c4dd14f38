"""Loading of a compiled library and questions to it, with errors that name the reason and the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def load(library: Path) -> None:
    """Load the library and register its ops with torch.

    Raises OSError, with the dynamic loader's reason, if the library does not load: it is damaged, or was built for
    another processor, another C++ runtime or an incompatible torch.
    """
    try:
        torch.ops.load_library(library)
    except OSError as error:  # torch gives the path alone and has the loader's reason as the cause
        raise OSError(
            f"{library} must load under torch {torch.__version__}, got: {error.__cause__ or error}; rebuild it with "
            "`make ext`, or install the package again"
        ) from error


def fact(ask: Callable[[], str]) -> str:
    """Return what `ask` returns about a library, or the text of its error: it is not built, or is broken."""
    try:
        return ask()
    except (RuntimeError, ValueError, OSError) as reason:
        return str(reason)
