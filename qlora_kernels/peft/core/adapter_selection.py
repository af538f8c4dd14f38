"""Which adapters are active: one AdapterSelection per PeftModel, read by each adapted layer and hook when it runs.

`set_adapter` changes the default for all later calls. The settings of one call (`disable_adapter`, `adapter_names`, the
padding mask) are a CallState in a ContextVar, which other threads and asyncio tasks do not see and which ends with the
call. torch.compile cannot read a ContextVar, so compiled code reads a thread-local copy of it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

BASE = "__base__"  # PEFT's name for a row without an adapter


@dataclass(frozen=True)
class CallState:
    """The adapters and masks of one call.

    active: adapters whose contributions are added.   enabled: False computes the base model.
    rows: one adapter name per row of the batch, or None.
    padding: [B, S], 1 for tokens and 0 for padding; the model's attention_mask, for gates that average over tokens.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    rows: tuple[str, ...] | None = None
    padding: Tensor | None = None

    def has(self, name: str) -> bool:
        """Whether adapter `name` is active in this call."""
        return self.enabled and name in (self.active if self.rows is None else self.rows)


States = tuple[tuple["AdapterSelection", CallState], ...]
"""The states of the running call, outermost first. The last state of a selection applies."""

_states: ContextVar[States] = ContextVar("qlora_kernels_call_states", default=())


class _ThreadStates(threading.local):
    states: States = ()


_compiled = _ThreadStates()  # the copy for compiled code

_selections: weakref.WeakSet[AdapterSelection] = weakref.WeakSet()
_selections_lock = threading.Lock()


class AdapterSelection:
    """The active adapters of one PeftModel, by default and in the running call."""

    def __new__(cls) -> AdapterSelection:
        # Also called for copies and for unpickled selections.
        self = super().__new__(cls)
        with _selections_lock:
            _selections.add(self)
        return self

    def __init__(self) -> None:
        self.default = CallState()

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that are active by default."""
        return self.default.active

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        self.default = CallState(active=names)

    @property
    def state(self) -> CallState:
        """The state that applies to the running call."""
        # Every adapted layer reads this in every call, so _current() is inlined here.
        for owner, state in reversed(_compiled.states if torch.compiler.is_compiling() else _states.get()):
            if owner is self:
                return state
        return self.default

    def within(self, **changes: Any) -> contextlib.AbstractContextManager[None]:
        """Set fields of the state inside the `with`, in this thread or task."""
        return using_states((*_current(), (self, replace(self.state, **changes))))

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Compute the base model inside the `with`."""
        return self.within(enabled=False)

    def has(self, name: str) -> bool:
        """Whether adapter `name` is active in the running call."""
        return self.state.has(name)

    def replaces(self, name: str) -> bool:
        """Whether the running call uses adapter `name`'s copies of parameters; never in calls with adapters by row."""
        state = self.state
        return state.enabled and state.rows is None and name in state.active

    def row_index(self, name: str, x: Tensor) -> Tensor | None:
        """Return the indices of the rows of x that use the active adapter `name`; None = all rows."""
        if self.state.rows is None:
            return None
        return torch.tensor([i for i, row in enumerate(self.rows_of(x.shape[0])) if row == name], device=x.device)

    def owners(self, names: Sequence[str], x: Tensor) -> Tensor | None:
        """Return for each row of x the index of its adapter in `names`, or -1; None without adapters by row."""
        if self.state.rows is None:
            return None
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place.get(row, -1) for row in self.rows_of(x.shape[0])], device=x.device)

    def rows_of(self, batch: int) -> tuple[str, ...]:
        """Return `rows` for the `batch` rows of a layer's input, which are more if beams or tokens are separate
        rows.
        Raises ValueError if `batch` is no multiple of the number of names.
        """
        rows = self.state.rows or ()
        repeats, rest = divmod(batch, max(len(rows), 1))
        if rest:
            raise ValueError(f"adapter_names: must be one per row of the batch, {batch}, got {len(rows)}")
        return tuple(name for name in rows for _ in range(repeats))


def _current() -> States:
    return _compiled.states if torch.compiler.is_compiling() else _states.get()


@contextlib.contextmanager
def using_states(states: States) -> Iterator[None]:
    """Apply these states, and no others, inside the `with`, in this thread or task."""
    if torch.compiler.is_compiling():
        before = _compiled.states
        _compiled.states = states
        try:
            yield
        finally:
            _compiled.states = before
        return
    token = _states.set(states)
    _compiled.states = states
    try:
        yield
    finally:
        _states.reset(token)
        _compiled.states = _states.get()


def capture_states() -> States:
    """Return the present state of every selection, for using_states later or in another thread."""
    with _selections_lock:
        selections = list(_selections)
    return tuple((selection, selection.state) for selection in selections)


class PerThread(Generic[T]):
    """One value per thread, by which a hook passes data to a later hook of the same call.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def put(self, value: T) -> None:
        self._values[_thread()] = value

    def get(self) -> T | None:
        """Return the value of this thread, or None."""
        return self._values.get(_thread())

    def take(self) -> T | None:
        """Return and remove this thread's value, or return None."""
        return self._values.pop(_thread(), None)

    def __reduce__(self) -> tuple[type[PerThread[T]], tuple[()]]:
        return PerThread, ()


def _thread() -> int:
    # torch.compile does not support get_ident; it runs one call at a time.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
