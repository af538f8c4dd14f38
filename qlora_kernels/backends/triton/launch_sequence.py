"""All launches of one call, and the memory between them, prepared once for each size of a problem.

Tensors have numbers, their slots: first the inputs of the call, then the memory that the sequence allocates. The
launcher of each kernel adds its launches by slots, so that launchers combine to larger sequences:

    sequence = LaunchSequence(inputs=2)                    # slots 0 and 1
    out = sequence.allocate((M, N), torch.bfloat16)        # slot 2
    sequence.add(kernel.prepare(grid, numbers), 0, 1, out)
    sequence.returns(out)
    (y,) = sequence(x, w)

Memory that is not returned is temporary. A call takes all of its temporary memory from one allocation.

The host time of a call is that of its allocations and launches: alignment, dtypes, device, stream and profilers are
looked at once for all tensors and launches of the call, by the rules of launch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rounding import round_up
from .launch import Launch, address_of, current_stream, is_observed, kind_of

Slot = int

TEMPORARY_ALIGNMENT = 256
"""The bytes to which each temporary memory is aligned in the allocation; Triton specializes on 16."""


class _Memory(NamedTuple):
    """Contiguous memory that each call allocates."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class LaunchSequence:
    """Launches in order, over the tensors of a call and memory of the call itself.

    inputs: number of input tensors.   typed: those whose dtypes may differ from call to call.
    The device of the first input must be the current one; memory is allocated on it.
    """

    __slots__ = ("_hooks", "_inputs", "_kept", "_launches", "_memory", "_offsets", "_results", "_temporary", "_typed")

    def __init__(self, inputs: int, typed: slice = slice(None)) -> None:
        self._inputs, self._typed = inputs, typed
        self._memory: list[_Memory] = []
        self._launches: list[tuple[Launch, tuple[Slot, ...]]] = []
        self._hooks: list[Sequence[Any]] = []
        self._results: dict[Slot, _Memory] = {}
        self._offsets: dict[Slot, int] = {}
        """Slot -> its first byte in the temporary memory."""
        self._temporary = _bytes(0)
        self._kept: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        """Kind of the call -> (run, grid, its arguments between stream and pointers, what takes the pointers, the
        arguments that follow them) of each launch.
        """

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """Return the slot of memory that each call allocates."""
        strides = tuple(prod(shape[place + 1 :]) for place in range(len(shape)))
        self._memory.append(_Memory(shape, strides, dtype))
        return self._inputs + len(self._memory) - 1

    def add(self, launch: Launch, *pointers: Slot) -> None:
        """Add a launch. pointers: the slots of its pointers, at least two."""
        self._launches.append((launch, pointers))
        self._hooks.append(launch.hooks)

    def returns(self, *results: Slot) -> None:
        """Make calls return the allocated memory of these slots; call it once, after the last `add`."""
        memory = dict(enumerate(self._memory, start=self._inputs))
        self._results = {slot: memory.pop(slot) for slot in results}
        end = 0
        for slot, each in memory.items():
            self._offsets[slot] = end
            end += round_up(each.nbytes, TEMPORARY_ALIGNMENT)
        self._temporary = _bytes(end)

    @property
    def temporary_bytes(self) -> int:
        """The bytes of temporary memory of a call."""
        return self._temporary.nbytes

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Launch all, and return the results."""
        allocate = _allocator(inputs[0])
        results = [allocate(*memory) for memory in self._results.values()]
        addresses = [*map(address_of, inputs), *map(address_of, results)]
        if self._offsets:
            temporary = allocate(*self._temporary)
            begin = address_of(temporary)
            addresses += [begin + offset for offset in self._offsets.values()]
        kind = kind_of(addresses, inputs[0].get_device(), inputs[self._typed])
        kept = self._kept.get(kind)
        if kept is None or any(self._hooks) or is_observed():
            self._launch_each(kind, inputs, results)
            return results
        stream = current_stream(kind[0])
        for run, grid, head, pointers_of, rest in kept:
            run(*grid, stream, *head, pointers_of(addresses) + rest)
        return results

    def _launch_each(self, kind: tuple[Any, ...], inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Launch one by one, and keep the launches for inputs of this kind if each of them could be kept."""
        tensors = dict(enumerate(inputs)) | dict(zip(self._results, results, strict=True))
        allocate = _allocator(inputs[0])
        for slot in self._offsets:
            tensors[slot] = allocate(*self._memory[slot - self._inputs])
        place_of = {slot: place for place, slot in enumerate(tensors)}
        entries: list[tuple[Any, ...]] = []
        for launch, slots in self._launches:
            arguments = [tensors[slot] for slot in slots]
            launch(*arguments)
            kept = launch.kept_for(arguments)
            if kept is not None:
                pointers_of = itemgetter(*(place_of[slot] for slot in slots))
                entries.append((kept.compiled.run, launch.grid, kept.compiled.head, pointers_of, kept.rest))
        if len(entries) == len(self._launches):
            self._kept[kind] = entries


def _bytes(count: int) -> _Memory:
    return _Memory((count,), (1,), torch.uint8)


_empty_on_current_gpu: Callable[..., Tensor] | None = getattr(
    getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None
)
"""torch's allocation for inductor's code, without a pass through the dispatcher, which takes half of the time of
new_empty_strided; None in a torch that has no such function.
"""


def _allocator(tensor: Tensor) -> Callable[..., Tensor]:
    """Return allocate(shape, strides, dtype), for memory on the device of `tensor`, which is the current device."""
    if tensor.is_cuda and _empty_on_current_gpu is not None:
        return _empty_on_current_gpu
    return lambda shape, strides, dtype: tensor.new_empty_strided(shape, strides, dtype=dtype)
