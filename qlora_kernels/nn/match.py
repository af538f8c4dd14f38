"""The rule of all lists of module names: names, endings of names, a regular expression, or a predicate.

`replace_linear`, `skip`, PEFT configurations, the command's options and the adapter files use these functions and no
others. The rule for names is that of Hugging Face PEFT's `target_modules` (peft/tuners/tuners_utils.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable

from torch import nn

Names = str | Collection[str]
"""A regular expression that must match a whole dotted name, or a collection of names and endings of names (`q_proj`
matches every `*.q_proj`)."""

Pattern = Names | Callable[[str, nn.Module], bool]
"""Names, or a predicate of (name, module)."""


def regular(expression: str, around: str = "{}") -> re.Pattern[str]:
    """Return a compiled regular expression, which stands in `around`.

    Raises ValueError, naming the expression, if it is none.
    """
    try:
        return re.compile(around.format(expression))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"a pattern must be a regular expression, got {expression[:60]!r} ({error})") from error


def checked_pattern(field: str, pattern: Pattern | Iterable[str]) -> Pattern:
    """Return a caller's pattern, with the names of an iterable in a tuple, because it is read more than once.

    field: the name of the argument in messages.
    Raises TypeError for what is no pattern; ValueError for a string that is not a regular expression.
    """
    if isinstance(pattern, str):
        try:
            regular(pattern)
        except ValueError as error:
            why = f"({error.__cause__})"
            raise ValueError(f"{field} must be names or a regular expression, got {pattern!r} {why}") from error
        return pattern
    if callable(pattern):
        return pattern
    names = tuple(pattern) if isinstance(pattern, Iterable) and not isinstance(pattern, bytes) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{field} must be names, a regular expression or a predicate of (name, module), got {pattern!r}; pass () "
            "for no module"
        )
    return names


def matches(pattern: Pattern, name: str, module: nn.Module | None = None) -> bool:
    """Whether `pattern` matches the module called `name`.   module: needed if the pattern is a predicate."""
    if isinstance(pattern, str):
        return regular(pattern).fullmatch(name) is not None
    if callable(pattern):
        assert module is not None
        return pattern(name, module)
    return any(name == item or name.endswith("." + item) for item in pattern)


def contained_in(pattern: Names, name: str) -> bool:
    """Whether `pattern` matches the module called `name` or a module that contains it."""
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def is_skipped(pattern: Pattern, name: str, module: nn.Module | None = None) -> bool:
    """Whether `pattern`, a list of modules to leave out, matches a module or a block that contains it.

    module: needed if the pattern is a predicate, which is asked about the module alone.
    """
    return matches(pattern, name, module) if callable(pattern) else contained_in(pattern, name)


def matches_ending(expression: str, name: str) -> bool:
    """Whether a regular expression matches a name or a dotted ending of it: the keys of PEFT's rank_pattern."""
    return regular(expression, r"(.*\.)?({})$").match(name) is not None


def number_after(expression: str, name: str) -> int | None:
    """Return the first number that follows a part of the name which the regular expression matches, or None.

    This is the rule of PEFT's layers_pattern. The first numbered part is the layer; a later one may be an expert.
    """
    found = regular(expression, r"(?:^|.*?\.){}\.(\d+)\.").match(name)
    return int(found[1]) if found else None


def as_names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the names in a list of names; a string is one name, and None is an empty list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def unmatched(wanted: Names, names: Collection[str]) -> list[str]:
    """Return the items of `wanted` that match none of `names`; a regular expression is one item."""
    patterns: list[tuple[str, Names]] = [(wanted, wanted)] if isinstance(wanted, str) else [(w, (w,)) for w in wanted]
    return [item for item, pattern in patterns if not any(matches(pattern, name) for name in names)]


def check_names(field: str, wanted: Names, names: Collection[str], *, of: str = "a module") -> None:
    """Raise ValueError, with the nearest names, if an item of `wanted` matches none of `names`.

    field: the name of the list in the message.   of: the kind of thing that `names` are names of.
    """
    if lost := unmatched(wanted, names):
        kind = " as a regular expression for its whole name" if isinstance(wanted, str) else ""
        raise ValueError(
            f"{field}: every name must match {of}{kind}, got {', '.join(map(repr, lost))}; "
            f"nearest names: {nearest(lost, names)}"
        )


def nearest(wanted: Iterable[str], names: Collection[str], most: int = 5) -> list[str]:
    """Return likely intended names for an error message: last parts of names, or whole names for a dotted name."""
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    found: list[str] = []
    for want in wanted:
        last = want.rsplit(".", 1)[-1]
        if "." in want:
            found += difflib.get_close_matches(want, names, n=most)
        found += difflib.get_close_matches(last, endings, n=most)
    return list(dict.fromkeys(found))[:most] or sorted(endings)[:most]
