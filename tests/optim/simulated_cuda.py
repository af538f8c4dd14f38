"""A Driver whose streams are queues: nothing runs when it is enqueued, and `drain` interleaves the streams at random.

Every order that the events permit is therefore reached with some seed, including those in which an update overtakes its
prefetch. The device has `capacity` bytes of unified memory. As in NVIDIA's driver, the pages that were migrated or
prefetched longest ago are evicted; a kernel's accesses do not keep a page. Bytes that are absent in an update are
counted in `faulted_bytes`.
"""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STREAMS = ("compute", "fetch", "write_back")
PAGE = 64


class SimulatedDriver:
    """A simulated implementation of managed_memory.Driver."""

    def __init__(self, *, capacity: int = 1 << 60, fail_allocation: int | None = None) -> None:
        self.queues: dict[str, deque[tuple[str, Any]]] = {name: deque() for name in STREAMS}
        self.done: set[int] = set()
        self.events = 0
        self.capacity = capacity
        self.resident: OrderedDict[int, None] = OrderedDict()
        self.faulted_bytes = 0
        self.log: list[tuple[str, int]] = []
        self.live = 0
        self.allocations = 0
        self.fail_allocation = fail_allocation
        self.captured = False
        self.synchronized: list[str] = []

    def allocate(self, nbytes: int) -> Tensor:
        self.allocations += 1
        if self.allocations == self.fail_allocation:
            raise RuntimeError(f"cudaMallocManaged: {nbytes} bytes: out of memory")
        tensor = torch.zeros(nbytes, dtype=torch.uint8)
        self.live += 1
        weakref.finalize(tensor.untyped_storage(), self._freed)
        return tensor

    def _freed(self) -> None:
        self.live -= 1

    allocate_managed = allocate_pinned = allocate

    def allocate_device(self, nbytes: int) -> Tensor:
        return self.allocate(nbytes).fill_(0xFF)  # NaN, so that reads of states that were not copied in are detected

    def to_device(self, table: Tensor) -> Tensor:
        return table

    def prefetch(self, arena: Tensor, start: int, stop: int) -> None:
        self.log.append(("prefetch", start))
        self.enqueue("fetch", lambda: self.bring_in(start, stop, mark_used=True))

    def copy(self, target: Tensor, source: Tensor, stream: str) -> None:
        self.enqueue(stream, lambda: target.copy_(source))

    def record(self, stream: str) -> int:
        self.events += 1
        event = self.events
        self.enqueue(stream, lambda: self.done.add(event))
        return event

    def wait(self, stream: str, event: int) -> None:
        self.queues[stream].append(("wait", event))

    def synchronize(self, stream: str) -> None:
        self.synchronized.append(stream)
        self.drain(random.Random(0))

    def capturing(self) -> bool:
        return self.captured

    def enqueue(self, stream: str, work: Callable[[], object]) -> None:
        self.queues[stream].append(("run", work))

    def access(self, start: int, stop: int) -> None:
        """Record a kernel's use of the bytes."""
        self.faulted_bytes += self.bring_in(start, stop, mark_used=False)

    def bring_in(self, start: int, stop: int, *, mark_used: bool) -> int:
        """Bring the bytes in, and return how many were absent."""
        missing = 0
        for page in range(start // PAGE, -(-stop // PAGE)):
            missing += PAGE * (page not in self.resident)
            self.resident[page] = None
            if mark_used:
                self.resident.move_to_end(page)
        while len(self.resident) * PAGE > self.capacity:
            self.resident.popitem(last=False)
        return missing

    def drain(self, rng: random.Random) -> None:
        """Run everything, one entry at a time, from a random stream among those that can continue."""
        while any(self.queues.values()):
            ready = [
                name
                for name, queue in self.queues.items()
                if queue and (queue[0][0] == "run" or queue[0][1] in self.done)
            ]
            assert ready, "the streams wait for each other"
            kind, work = self.queues[rng.choice(ready)].popleft()
            if kind == "run":
                work()
