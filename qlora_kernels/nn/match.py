"""Which modules a user means: by name, suffix, regular expression or predicate. All lists of names follow this rule."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable

from torch import nn

Names = str | Collection[str]
"""A regular expression that must match a whole dotted name, or a collection of names and of endings of names
(`q_proj` means every `*.q_proj`)."""

Pattern = Names | Callable[[str, nn.Module], bool]
"""Names, or a predicate of name and module."""


def matches(pattern: Pattern, name: str, module: nn.Module | None = None) -> bool:
    """Whether `pattern` means the module called `name`.   module: needed where the pattern is a predicate."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    if callable(pattern):
        assert module is not None
        return pattern(name, module)
    return any(name == item or name.endswith("." + item) for item in pattern)


def contained_in(pattern: Names, name: str) -> bool:
    """Whether `pattern` means the module called `name` or a module that contains it."""
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def as_names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names in a list of names. A string is one name, None is no name."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def unmatched(wanted: Names, names: Collection[str]) -> list[str]:
    """The items of `wanted` that mean none of `names`; a regular expression is one item."""
    patterns: list[tuple[str, Names]] = [(wanted, wanted)] if isinstance(wanted, str) else [(w, (w,)) for w in wanted]
    return [item for item, pattern in patterns if not any(matches(pattern, name) for name in names)]


def check_names(field: str, wanted: Names, names: Collection[str], *, of: str = "a module") -> None:
    """Raises ValueError where an item of `wanted` means none of `names`, and gives the nearest names.

    field: what the error calls the list.   of: what the names are the names of.
    """
    if lost := unmatched(wanted, names):
        kind = " as a regular expression for its whole name" if isinstance(wanted, str) else ""
        raise ValueError(
            f"{field}: every name must match {of}{kind}, got {', '.join(map(repr, lost))}; "
            f"nearest names: {nearest(lost, names)}"
        )


def nearest(wanted: Iterable[str], names: Collection[str], most: int = 5) -> list[str]:
    """What was probably wanted, for an error message: the last parts of names, or for a dotted name whole names."""
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    found: list[str] = []
    for want in wanted:
        last = want.rsplit(".", 1)[-1]
        if "." in want:
            found += difflib.get_close_matches(want, names, n=most)
        found += difflib.get_close_matches(last, endings, n=most)
    return list(dict.fromkeys(found))[:most] or sorted(endings)[:most]
