"""Optimizer states beyond the GPU's memory: unified memory with look-ahead prefetch, or pinned double buffering.

ManagedMemory. One arena from cudaMallocManaged, advised once. While the kernel updates chunk i on the current stream,
chunks i+1.. migrate on a stream of their own; events order the two, the host waits for neither. Chunks that the driver
evicted come back at copy speed instead of page fault by page fault, and nothing moves while everything fits. Under
CUDA graph capture, which records no prefetch, pages arrive on demand.

StagedMemory. Where the GPU cannot fault on unified memory (Windows, WSL, no concurrentManagedAccess), the arena is
pinned host memory and each chunk passes through one of look_ahead + 1 buffers on the device: copied in ahead of its
update, copied out behind it, on two further streams, so both directions of PCIe are busy.

Both do nothing but carry out paging_plan over a Driver: CudaDriver is the real one, tests record a false one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..ops.managed_memory import managed_alloc, managed_concurrent_access, managed_prefer_device, managed_prefetch
from .paging_plan import Chunk, plan_schedule, plan_staging
from .state_memory import ResidentMemory, StateMemory, Update, segment_table

Stream = Literal["compute", "fetch", "write_back"]
"""compute is the stream that is current when the step runs; the others are the driver's own."""


class Driver(Protocol):
    """What the two memories ask of CUDA. Every call enqueues and returns at once; failures are exceptions."""

    def allocate_managed(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of zeros in unified memory, advised to prefer the device; freed with its last reference."""
        ...

    def allocate_pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of zeros in page-locked host memory."""
        ...

    def allocate_device(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], undefined, in device memory."""
        ...

    def to_device(self, table: Tensor) -> Tensor:
        """Return a copy of `table` in the memory of the device."""

    def prefetch(self, arena: Tensor, start: int, stop: int) -> None:
        """Migrate bytes [start, stop) to the device, on stream "fetch"."""
        ...

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None: ...

    def record(self, stream: Stream) -> Any:
        """An event behind all that is enqueued on `stream` so far."""
        ...

    def wait(self, stream: Stream, event: Any) -> None:
        """All that is enqueued on `stream` from now on runs after `event`."""
        ...

    def synchronize(self, stream: Stream) -> None:
        """The one call for which the host waits: until `stream` is empty."""
        ...

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""
        ...


class ManagedMemory:
    """An arena in unified memory."""

    kind = "managed"

    def __init__(self, nbytes: int, chunks: tuple[Chunk, ...], driver: Driver, *, look_ahead: int) -> None:
        self.look_ahead = look_ahead
        self.prefetched_bytes = 0
        self.arena = driver.allocate_managed(nbytes)
        self._driver = driver
        self.replan(chunks)

    def replan(self, chunks: tuple[Chunk, ...]) -> None:
        self.chunks = chunks
        self._segments = [self._driver.to_device(segment_table(chunk.segments)) for chunk in chunks]

    def run(self, active: Sequence[int], update: Update) -> None:
        driver = self._driver
        if driver.capturing():
            for index in active:
                update(self.chunks[index], self.arena, self._segments[index])
            return
        # Whatever the caller has enqueued (the last step among it) still uses the arena.
        driver.wait("fetch", driver.record("compute"))
        fetched: dict[int, Any] = {}
        updated: dict[int | None, Any] = {}
        for action in plan_schedule(len(active), self.look_ahead):
            chunk = self.chunks[active[action.chunk]]
            if action.kind == "prefetch":
                if action.after is not None:
                    driver.wait("fetch", updated.pop(action.after))
                for start, stop in chunk.ranges:
                    driver.prefetch(self.arena, start, stop)
                fetched[action.chunk] = driver.record("fetch")
                self.prefetched_bytes += chunk.nbytes
            else:
                driver.wait("compute", fetched.pop(action.chunk))
                update(chunk, self.arena, self._segments[active[action.chunk]])
                updated[action.chunk] = driver.record("compute")

    def settle(self) -> None:
        """Reading the arena is ordered behind the updates by the caller's stream."""

    def resident_bytes(self) -> None:
        """Unknown: the driver moves pages as it likes."""
        return None


class StagedMemory:
    """An arena in pinned memory that passes through buffers on the device."""

    kind = "staged"

    def __init__(self, nbytes: int, chunks: tuple[Chunk, ...], driver: Driver, *, look_ahead: int) -> None:
        self.look_ahead = look_ahead
        self.prefetched_bytes = 0
        self.arena = driver.allocate_pinned(nbytes)
        self._driver = driver
        self.replan(chunks)

    def replan(self, chunks: tuple[Chunk, ...]) -> None:
        driver = self._driver
        self.chunks = chunks
        self._staging = [plan_staging(chunk) for chunk in chunks]
        self._segments = [driver.to_device(segment_table(segments)) for segments, _, _ in self._staging]
        buffer_bytes = max((size for _, _, size in self._staging), default=0)
        self._buffers = [driver.allocate_device(buffer_bytes) for _ in range(min(self.look_ahead + 1, len(chunks)))]

    def run(self, active: Sequence[int], update: Update) -> None:
        driver = self._driver
        driver.wait("fetch", driver.record("compute"))
        fetched: dict[int, Any] = {}
        free: dict[int | None, Any] = {}  # position -> its buffer has been written back
        for action in plan_schedule(len(active), self.look_ahead):
            index = active[action.chunk]
            buffer = self._buffers[action.chunk % len(self._buffers)]
            if action.kind == "prefetch":
                if action.after is not None:
                    driver.wait("fetch", free.pop(action.after))
                self._copy(index, buffer, "fetch")
                fetched[action.chunk] = driver.record("fetch")
                self.prefetched_bytes += self.chunks[index].nbytes
            else:
                driver.wait("compute", fetched.pop(action.chunk))
                update(self.chunks[index], buffer, self._segments[index])
                driver.wait("write_back", driver.record("compute"))
                self._copy(index, buffer, "write_back")
                free[action.chunk] = driver.record("write_back")
        # The next step, a state_dict or a free on the caller's stream comes after the last write-back.
        driver.wait("compute", driver.record("write_back"))

    def settle(self) -> None:
        """The host reads the arena itself: it has to wait for the last write-back."""
        self._driver.synchronize("write_back")

    def _copy(self, index: int, buffer: Tensor, stream: Stream) -> None:
        _, offsets, _ = self._staging[index]
        for (start, stop), offset in zip(self.chunks[index].ranges, offsets, strict=True):
            host, device = self.arena[start:stop], buffer[offset : offset + stop - start]
            target, source = (device, host) if stream == "fetch" else (host, device)
            self._driver.copy(target, source, stream)

    def resident_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)


class CudaDriver:
    """The device's streams and torch's allocators, and the compiled library for unified memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {
            name: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for name in ("fetch", "write_back")
        }

    def allocate_managed(self, nbytes: int) -> Tensor:
        arena = managed_alloc(nbytes, self.device)
        managed_prefer_device(arena)
        return arena

    def allocate_pinned(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def allocate_device(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def to_device(self, table: Tensor) -> Tensor:
        """Return a copy of `table` in the memory of the device."""
        return table.to(self.device)

    def prefetch(self, arena: Tensor, start: int, stop: int) -> None:
        with torch.cuda.stream(self._streams["fetch"]):
            managed_prefetch(arena, start, stop)

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        with torch.cuda.stream(self._stream(stream)):
            target.copy_(source, non_blocking=True)

    def record(self, stream: Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream(stream))
        return event

    def wait(self, stream: Stream, event: torch.cuda.Event) -> None:
        self._stream(stream).wait_event(event)

    def synchronize(self, stream: Stream) -> None:
        self._stream(stream).synchronize()

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _stream(self, name: Stream) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device) if name == "compute" else self._streams[name]


def cuda_memory(nbytes: int, chunks: tuple[Chunk, ...], device: torch.device, *, look_ahead: int) -> StateMemory:
    """The best that `device` and this installation offer. What is worse than unified memory is said once."""
    concurrent = managed_concurrent_access(device)
    if concurrent is None:
        _say_once("PagedAdamW: states on CUDA do not page, because the CUDA library is missing; see qk.backends()")
        return ResidentMemory(nbytes, chunks, device)
    if not concurrent:
        _say_once(f"PagedAdamW: {device} has no concurrent managed access; states pass through pinned buffers instead")
        return StagedMemory(nbytes, chunks, CudaDriver(device), look_ahead=look_ahead)
    return ManagedMemory(nbytes, chunks, CudaDriver(device), look_ahead=look_ahead)


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
