"""All launches of one call, and the memory between them, prepared once for each size of a problem.

Tensors have numbers, their slots: first the inputs of the call, then the memory that the sequence allocates. The
launcher of each kernel adds its launches by slots, so that launchers combine to larger sequences:

    sequence = LaunchSequence(inputs=2)                    # slots 0 and 1
    out = sequence.allocate((M, N), torch.bfloat16)        # slot 2
    sequence.add(kernel.prepare(grid, numbers), 0, 1, out)
    *_, y = sequence(x, w)

The host time of a call is that of its allocations and launches: alignment, dtypes, device, stream and profilers are
looked at once for all tensors and launches of the call, by the rules of launch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, current_stream, is_observed, kind_of

Slot = int


class LaunchSequence:
    """Launches in order, over the tensors of a call and memory of the call itself.

    The device of the first input must be the current one; memory is allocated on it.
    """

    __slots__ = ("_hooks", "_inputs", "_kept", "_launches", "_memory")

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs
        self._memory: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []
        """Shape, strides and dtype."""
        self._launches: list[tuple[Launch, itemgetter[Any]]] = []
        self._hooks: list[Sequence[Any]] = []
        self._kept: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        """Kind of the call -> (run, grid, its arguments between stream and pointers, what takes the pointers, the
        arguments that follow them) of each launch.
        """

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """Return the slot of memory that each call allocates."""
        strides = [prod(shape[place + 1 :]) for place in range(len(shape))]
        self._memory.append((shape, tuple(strides), dtype))
        return self._inputs + len(self._memory) - 1

    def add(self, launch: Launch, *pointers: Slot) -> None:
        """Add a launch. pointers: the slots of its pointers, at least two."""
        self._launches.append((launch, itemgetter(*pointers)))
        self._hooks.append(launch.hooks)

    @property
    def memory(self) -> list[int]:
        """The bytes of each allocation, in the order of the slots."""
        return [prod(shape) * dtype.itemsize for shape, _, dtype in self._memory]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Launch all, and return the inputs and the allocated tensors by slot."""
        tensors = [*inputs]
        if inputs[0].is_cuda and _empty_on_current_gpu is not None:
            for shape, strides, dtype in self._memory:
                tensors.append(_empty_on_current_gpu(shape, strides, dtype))
        else:
            for shape, _, dtype in self._memory:
                tensors.append(inputs[0].new_empty(shape, dtype=dtype))
        kind, addresses = kind_of(tensors, inputs)
        kept = self._kept.get(kind)
        if kept is None or any(self._hooks) or is_observed():
            self._launch_each(kind, tensors)
            return tensors
        stream = current_stream(kind[0])
        for run, grid, head, pointers_of, rest in kept:
            run(*grid, stream, *head, pointers_of(addresses) + rest)
        return tensors

    def _launch_each(self, kind: tuple[Any, ...], tensors: list[Tensor]) -> None:
        """Launch one by one, and keep the launches for inputs of this kind if each of them could be kept."""
        entries: list[tuple[Any, ...]] = []
        for launch, pointers_of in self._launches:
            arguments = pointers_of(tensors)
            launch(*arguments)
            kept = launch.kept_for(arguments)
            if kept is not None:
                entries.append((kept.compiled.run, launch.grid, kept.compiled.head, pointers_of, kept.rest))
        if len(entries) == len(self._launches):
            self._kept[kind] = entries


_empty_on_current_gpu = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None)
"""torch's allocation for inductor's code, without a pass through the dispatcher, which takes half of the time of
new_empty; None in a torch that has no such function.
"""
