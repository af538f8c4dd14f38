"""Which modules a user means: by name, suffix, regular expression or predicate."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable

from torch import nn

Pattern = str | Collection[str] | Callable[[str, nn.Module], bool]
"""A regular expression that must match a module's whole dotted name; or names and suffixes of names (`q_proj` means
every `*.q_proj`); or a predicate of name and module."""


def matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether `pattern` means the module called `name`."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    if callable(pattern):
        return pattern(name, module)
    return any(name == item or name.endswith("." + item) for item in pattern)


def nearest(wanted: Iterable[str], names: Collection[str], most: int = 5) -> list[str]:
    """Names that look most like what was wanted, for an error message; comparing last parts too."""
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(list(names))}
    found: list[str] = []
    for want in wanted:
        last = want.rsplit(".", 1)[-1]
        found += difflib.get_close_matches(want, names, n=most)
        found += [by_last[key] for key in difflib.get_close_matches(last, by_last, n=most)]
    return list(dict.fromkeys(found))[:most] or sorted(by_last.values())[:most]
