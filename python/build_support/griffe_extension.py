"""A griffe extension that prepares docstrings for the API reference. `make docs` loads it (mkdocs.yml)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from docstring_lists import with_lists  # type: ignore[import-not-found]


class DocstringLists(griffe.Extension):
    """Applies `with_lists` to every function and class."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Rewrite the lists in the docstring of a function."""
        if func.docstring:
            func.docstring.value = with_lists(func.docstring.value, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Rewrite the lists in the docstring of a class."""
        if cls.docstring:
            parameters = {parameter.name for parameter in cls.parameters} | set(cls.members)
            cls.docstring.value = with_lists(cls.docstring.value, parameters)
