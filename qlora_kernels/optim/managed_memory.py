"""Optimizer states larger than the GPU's memory: unified memory with look-ahead prefetch, or double buffering.

ManagedMemory: one arena from cudaMallocManaged, advised once. While the kernel updates chunk i on the current stream,
the following chunks migrate on a separate stream. Events order the two streams; the host waits for neither. Chunks that
the driver evicted return at copy bandwidth instead of by page faults, and nothing moves as long as everything fits.
Under CUDA graph capture, which records no prefetch, pages migrate by faults.

StagedMemory: for GPUs without page faults on unified memory (Windows, WSL, no concurrentManagedAccess). The arena is
pinned host memory, and each chunk passes through one of look_ahead + 1 buffers on the device. It is copied in before
its update and copied out after it, on two further streams, so that both directions of PCIe are used.

Both classes execute paging_plan over a Driver: CudaDriver is the real one, and tests use a recording one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..ops.managed_memory import (
    managed_alloc,
    managed_concurrent_access,
    managed_prefer_device,
    managed_prefetch,
    page_locked_alloc,
)
from .paging_plan import Chunk, plan_schedule, plan_staging
from .state_memory import ResidentMemory, StateMemory, Update, segment_table

Stream = Literal["compute", "fetch", "write_back"]
"""compute is the stream that is current when the step runs; the driver owns the others."""


class Driver(Protocol):
    """The CUDA operations of the two memories. Every call enqueues and returns at once; failures are exceptions."""

    def allocate_managed(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] of zeros in unified memory that prefers the device; freed with its last reference."""
        ...

    def allocate_pinned(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] of zeros in page-locked host memory."""
        ...

    def allocate_device(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes], uninitialized, in device memory."""
        ...

    def to_device(self, table: Tensor) -> Tensor:
        """Return a copy of `table` in device memory."""

    def prefetch(self, arena: Tensor, start: int, stop: int) -> None:
        """Migrate bytes [start, stop) to the device on stream "fetch"."""
        ...

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None: ...

    def record(self, stream: Stream) -> Any:
        """Record an event after everything that is enqueued on `stream`; it is for one `wait`."""
        ...

    def wait(self, stream: Stream, event: Any) -> None:
        """Make everything that is enqueued on `stream` later wait for `event`, which may then be recorded again."""
        ...

    def synchronize(self, stream: Stream) -> None:
        """Wait on the host until `stream` is empty. No other call waits on the host."""
        ...

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""
        ...


class ManagedMemory:
    """An arena in unified memory with prefetch of the next chunks."""

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
        # Work that the caller has enqueued before, such as the previous step, may still use the arena.
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
                if action.chunk + self.look_ahead + 1 < len(active):  # a prefetch waits for this update
                    updated[action.chunk] = driver.record("compute")

    def settle(self) -> None:
        """Do nothing: the caller's stream orders reads of the arena after the updates."""

    def resident_bytes(self) -> None:
        """Return None, because only the driver knows which pages are resident."""
        return None


class StagedMemory:
    """An arena in pinned host memory whose chunks pass through buffers on the device."""

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
                if action.chunk + self.look_ahead + 1 < len(active):  # a chunk is fetched into this buffer
                    free[action.chunk] = driver.record("write_back")
        # The next step, a state_dict or a free on the caller's stream must wait for the last write-back.
        driver.wait("compute", driver.record("write_back"))

    def settle(self) -> None:
        """Wait for the last write-back, because the host reads the arena itself."""
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
    """A Driver on the device's streams, torch's allocators, and the compiled library for unified memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {name: torch.cuda.Stream(device) for name in ("fetch", "write_back")}
        self._free_events: list[torch.cuda.Event] = []

    def allocate_managed(self, nbytes: int) -> Tensor:
        arena = managed_alloc(nbytes, self.device)
        managed_prefer_device(arena)
        return arena

    def allocate_pinned(self, nbytes: int) -> Tensor:
        return page_locked_alloc(nbytes, self.device)

    def allocate_device(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def to_device(self, table: Tensor) -> Tensor:
        """Return a copy of `table` in device memory."""
        return table.to(self.device)

    def prefetch(self, arena: Tensor, start: int, stop: int) -> None:
        with torch.cuda.stream(self._streams["fetch"]):
            managed_prefetch(arena, start, stop)

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        with torch.cuda.stream(self._stream(stream)):
            target.copy_(source, non_blocking=True)

    def record(self, stream: Stream) -> torch.cuda.Event:
        event = self._free_events.pop() if self._free_events else torch.cuda.Event()
        event.record(self._stream(stream))
        return event

    def wait(self, stream: Stream, event: torch.cuda.Event) -> None:
        self._stream(stream).wait_event(event)
        # cudaStreamWaitEvent waits for the newest record at the time of the call; recording the event again, on any
        # stream, does not change it.
        self._free_events.append(event)

    def synchronize(self, stream: Stream) -> None:
        self._stream(stream).synchronize()

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _stream(self, name: Stream) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device) if name == "compute" else self._streams[name]


def cuda_memory(nbytes: int, chunks: tuple[Chunk, ...], device: torch.device, *, look_ahead: int) -> StateMemory:
    """Return the best memory that `device` and this installation support; warn once if it is not unified memory."""
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
