"""The arenas of an optimizer, and the place of each parameter's states in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .mapped_memory import MappedMemory
from .paging_plan import Chunk, plan_chunks, plan_slots
from .parameter_rules import check_param
from .shards import local
from .state_arena import StateArena
from .state_memory import StateMemory
from .state_watch import StateWatch

CHUNK_BYTES = 32 << 20
"""Bytes of state per chunk of a paged arena; large enough to use the full bandwidth of a disk or PCIe."""

COUNTERS_PER_ARENA = 1 << 40
"""Stride between the random counters of arenas, so that their stochastic rounding draws from disjoint ranges."""

Groups = Sequence[Mapping[str, Any]]
"""The optimizer's param_groups."""
States = dict[Any, dict[str, Any]]
"""The optimizer's state: parameter -> its states by name."""
MakeMemory = Callable[[int, "tuple[Chunk, ...]", torch.device], StateMemory]
"""(bytes, chunks, device) -> memory of a new arena."""


class StatePlacement:
    """The arenas of an optimizer's states.

    state_bits, page_dir: as for PagedAdamW. Groups, states and the function that makes memories are arguments of the
    methods and not attributes, so that the optimizer and its memory are freed with the last reference.
    """

    def __init__(self, state_bits: int, page_dir: str | Path | None) -> None:
        self.state_bits = state_bits
        self.page_dir = page_dir
        self.arenas: list[StateArena] = []
        self.places: dict[Tensor, tuple[StateArena, int]] = {}
        """Parameter -> its arena and its index there."""
        self.unplaced: list[Tensor] = []
        """Parameters of the groups that have no slot yet."""
        self.planned: list[list[Tensor]] = []
        """The parameters of each group at the time the chunks were planned."""
        self.watch = StateWatch()

    def settle(self) -> None:
        """Wait until the arenas may be read and written through their tensors."""
        for arena in self.arenas:
            arena.memory.settle()

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child, which shares mapped files with its parent."""
        for arena in self.arenas:
            if isinstance(arena.memory, MappedMemory):
                arena.memory.check_process()

    def close(self) -> None:
        """Release the arenas and their memory."""
        self.arenas.clear()
        self.places.clear()
        self.unplaced.clear()

    def follow(self, groups: Groups, state: States, make_memory: MakeMemory) -> None:
        """Adopt changes since the last step to the groups' parameters, their memory and their states."""
        self.replan_if_edited(groups, make_memory)
        if any(param.grad is not None for param in self.unplaced):
            self.reserve(groups, lambda param: param.grad is not None, make_memory)
        for arena in self.arenas:
            for index in arena.follow():
                if index not in arena.unstepped:
                    arena.show(index, state[arena.params[index]])
                    self.watch.look(state)
        if not self.watch.is_unchanged(state):
            self.take_states(groups, state, make_memory)

    def replan_if_edited(self, groups: Groups, make_memory: MakeMemory) -> None:
        """Plan the chunks of each arena again if the parameter lists of the groups were edited.

        Raises ValueError if a parameter occurs twice.
        """
        if _same_items(self.planned, [group["params"] for group in groups]):
            return
        params = params_of(groups)
        if len(set(params)) != len(params):
            raise ValueError("PagedAdamW: a parameter must occur once in all groups, got one that occurs twice")
        group_of = {param: index for index, group in enumerate(groups) for param in group["params"]}
        for arena in self.arenas:
            arena.memory.settle()
            group_numbers = [group_of.get(param) for param in arena.params]
            arena.members = {index for index, group in enumerate(group_numbers) if group is not None}
            arena.memory.replan(plan_chunks(arena.slots, group_numbers, self._chunk_bytes(arena.device)))
        self.reserve(groups, lambda param: param.requires_grad and not param.is_meta, make_memory)
        self.planned = [list(group["params"]) for group in groups]

    def reserve(self, groups: Groups, wanted: Callable[[Tensor], bool], make_memory: MakeMemory) -> None:
        """Allocate one more arena for each device with wanted parameters that have no slot yet."""
        missing: dict[torch.device, list[tuple[int, Tensor]]] = {}
        made: list[StateArena] = []
        for number, group in enumerate(groups):
            for param in group["params"]:
                if param not in self.places and wanted(param):
                    check_param(param)
                    missing.setdefault(param.device, []).append((number, param))
        for device, entries in missing.items():
            numbers, params = zip(*entries, strict=True)
            counter = (len(self.arenas) + len(made)) * COUNTERS_PER_ARENA
            sizes = [local(param).numel() for param in params]
            slots, nbytes = plan_slots(sizes, self.state_bits, first_counter=counter)
            chunks = plan_chunks(slots, numbers, self._chunk_bytes(device))
            made.append(StateArena(params, slots, make_memory(nbytes, chunks, device)))
        self.arenas += made
        for arena in made:
            self.places.update({param: (arena, index) for index, param in enumerate(arena.params)})
        self.unplaced = [param for param in params_of(groups) if param not in self.places]

    def take_states(self, groups: Groups, state: States, make_memory: MakeMemory) -> None:
        """Copy edited entries of `state` into the arenas, and reset states that were removed."""
        self.reserve(groups, lambda param: bool(state.get(param)), make_memory)
        taken = {
            param: entry
            for param, entry in state.items()
            if entry and param in self.places and not self.watch.holds(param, entry)
        }
        self._load(taken, state)
        self._clear_all_but([param for param, entry in state.items() if entry])
        self.watch.look(state)

    def replace_states(
        self, groups: Groups, state: States, states: Mapping[Tensor, Mapping[str, Any]], make_memory: MakeMemory
    ) -> None:
        """Write `states` into the arenas and clear all other states."""
        self.replan_if_edited(groups, make_memory)
        self.reserve(groups, lambda param: param in states, make_memory)
        state.clear()
        self._load(states, state)
        self._clear_all_but(states)
        self.watch.look(state)

    def check_load(self, groups: Groups, states: Mapping[Tensor, Mapping[str, Any]], make_memory: MakeMemory) -> None:
        """Allocate slots for the parameters of `states`. Raises ValueError if a state does not fit its parameter."""
        self.replan_if_edited(groups, make_memory)
        self.reserve(groups, lambda param: param in states, make_memory)
        for param, entry in states.items():
            arena, index = self.places[param]
            arena.check_load(index, entry)

    def show_first_states(self, arena: StateArena, grads: Sequence[Tensor | None], state: States) -> None:
        """Add the states of parameters that were updated for the first time to `state`."""
        first = [index for index in arena.unstepped if grads[index] is not None]
        for index in first:
            arena.show(index, state.setdefault(arena.params[index], {}))
        if first:
            arena.unstepped.difference_update(first)
            self.watch.look(state)

    def _load(self, states: Mapping[Tensor, Mapping[str, Any]], state: States) -> None:
        """Copy `states` into the arenas, all of them or none, and show them in `state`."""
        for param, entry in states.items():
            arena, index = self.places[param]
            arena.check_load(index, entry)
        copies = {}  # of arena tensors in another parameter's entry, which could be overwritten before they are read
        for param, entry in states.items():
            copies[param] = {
                name: value.clone() if any(arena.owns(value) for arena in self.arenas) else value
                for name, value in entry.items()
            }
        for param, entry in copies.items():
            arena, index = self.places[param]
            arena.load(index, entry)
            arena.unstepped.discard(index)
            shown = state.setdefault(param, entry)
            arena.show(index, shown)

    def _clear_all_but(self, kept: Iterable[Tensor]) -> None:
        """Reset the states of all other parameters to those before the first update."""
        kept = set(kept)
        for param, (arena, index) in self.places.items():
            if param not in kept and index not in arena.unstepped:
                arena.clear(index)
                arena.unstepped.add(index)

    def _chunk_bytes(self, device: torch.device) -> int | None:
        return CHUNK_BYTES if self.page_dir is not None or device.type == "cuda" else None


def params_of(groups: Groups) -> list[Tensor]:
    """Return the parameters of all groups, in order."""
    return [param for group in groups for param in group["params"]]


def _same_items(planned: list[list[Tensor]], current: list[list[Tensor]]) -> bool:
    return len(planned) == len(current) and all(
        len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(planned, current, strict=True)
    )
