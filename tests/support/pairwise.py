"""Selects, of a test's parametrized cases, those that cover every pair of values of two parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations

import pytest


def covering(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Return indices of cases in which each two values occur together that occur together in some of all cases.

    cases: parameter -> its value. In each step the case with most of the missing pairs is chosen, the first among
    equals, so that the choice depends only on the cases.
    """
    pairs = [set(combinations(sorted(case.items()), 2)) or set(case.items()) for case in cases]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen) or list(range(len(cases)))


def keep_pairwise(items: list[pytest.Item], concerns: Callable[[pytest.Item], bool]) -> list[pytest.Item]:
    """Remove, in place, cases of a test whose pairs of values other cases of it cover; return what was removed.

    concerns: whether a case may be removed; of the others, each test keeps all.
    """
    tests: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None) is not None and concerns(item):
            tests[item.path.as_posix(), item.originalname].append(item)  # type: ignore[attr-defined]
    removed = set()
    for cases in tests.values():
        chosen = {cases[i] for i in covering([_values(item) for item in cases])}
        removed |= set(cases) - chosen
    kept = [item for item in items if item not in removed]
    dropped = [item for item in items if item in removed]
    items[:] = kept
    return dropped


def _values(item: pytest.Item) -> dict[str, Hashable]:
    """Return parameter -> identity of its value, which the cases of a test share; several of one list are one."""
    params = item.callspec.params  # type: ignore[attr-defined]
    lists = [mark.args[0] for mark in item.iter_markers("parametrize")]
    groups = [names.replace(" ", "").split(",") if isinstance(names, str) else list(names) for names in lists]
    groups += [[name] for name in params if not any(name in group for group in groups)]
    return {",".join(group): tuple(id(params[name]) for name in group) for group in groups}
