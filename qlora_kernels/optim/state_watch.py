"""Notices when `optimizer.state` was changed by others than the optimizer: cleared, replaced, loaded by hand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import is_
from typing import Any


class StateWatch:
    """Remembers the entries of a `state` and the tensors in them, by identity, and compares in a microsecond or two a
    hundred parameters. In-place changes of the tensors themselves act on the arena, and need no notice.
    """

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._values: list[Any] = []
        self._known: dict[Any, tuple[dict[str, Any], list[Any]]] = {}

    def look(self, state: Mapping[Any, dict[str, Any]]) -> None:
        """Remember `state` as it is."""
        self._entries = list(state.values())
        self._values = list(chain.from_iterable(map(dict.values, self._entries)))
        self._known = {key: (entry, list(entry.values())) for key, entry in state.items()}

    def is_unchanged(self, state: Mapping[Any, dict[str, Any]]) -> bool:
        """Whether `state` holds what it held at the last look."""
        entries = state.values()
        if len(entries) != len(self._entries) or not all(map(is_, entries, self._entries)):
            return False
        values = list(chain.from_iterable(map(dict.values, self._entries)))
        return len(values) == len(self._values) and all(map(is_, values, self._values))

    def holds(self, key: Any, entry: dict[str, Any]) -> bool:
        """Whether one entry is unchanged since the last look."""
        known, values = self._known.get(key, (None, ()))
        return known is entry and len(values) == len(entry) and all(map(is_, entry.values(), values))
