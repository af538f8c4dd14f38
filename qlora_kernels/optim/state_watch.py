"""Detects changes of `optimizer.state` from outside: entries cleared, replaced or loaded by hand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import is_
from typing import Any


class StateWatch:
    """Compares the entries of a `state` and their tensors, by identity, with those of the last look.

    It takes one or two microseconds per hundred parameters. In-place changes of tensors need no detection, because they
    change the arena.
    """

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._values: list[Any] = []
        self._known: dict[Any, tuple[dict[str, Any], list[Any]]] = {}

    def look(self, state: Mapping[Any, dict[str, Any]]) -> None:
        """Remember the current entries of `state`."""
        self._entries = list(state.values())
        self._values = list(chain.from_iterable(map(dict.values, self._entries)))
        self._known = {key: (entry, list(entry.values())) for key, entry in state.items()}

    def is_unchanged(self, state: Mapping[Any, dict[str, Any]]) -> bool:
        """Whether `state` has the same entries as at the last look."""
        entries = state.values()
        if len(entries) != len(self._entries) or not all(map(is_, entries, self._entries)):
            return False
        values = list(chain.from_iterable(map(dict.values, self._entries)))
        return len(values) == len(self._values) and all(map(is_, values, self._values))

    def holds(self, key: Any, entry: dict[str, Any]) -> bool:
        """Whether one entry is unchanged since the last look."""
        known, values = self._known.get(key, (None, ()))
        return known is entry and len(values) == len(entry) and all(map(is_, entry.values(), values))
