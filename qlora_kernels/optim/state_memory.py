"""StateMemory, the interface of memories for optimizer states, and ResidentMemory, the simplest one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..ops.adamw_step import SEGMENT_COLUMNS, Segment
from .paging_plan import Chunk

Update = Callable[[Chunk, Tensor, Tensor], None]
"""update(chunk, arena, segments): runs the kernel on one chunk, given the chunk's bytes and segment rows."""


class StateMemory(Protocol):
    """One arena of bytes, zeroed on construction, with an update loop over its chunks. Freed with its last
    reference.
    """

    kind: str
    arena: Tensor
    """uint8 [nbytes]; the optimizer's state tensors are views of it."""
    chunks: tuple[Chunk, ...]
    prefetched_bytes: int
    """Bytes fetched in advance since construction."""

    def run(self, active: Sequence[int], update: Update) -> None:
        """Call `update` on each active chunk in order, with its bytes fetched in advance."""
        ...

    def replan(self, chunks: tuple[Chunk, ...]) -> None:
        """Use other chunks of the same arena from the next step on."""
        ...

    def settle(self) -> None:
        """Wait until the arena may be read and written through its tensors."""
        ...

    def resident_bytes(self) -> int | None:
        """Return the bytes of the arena in the memory where they are used; None if the system does not report it."""
        ...


class ResidentMemory:
    """An arena in ordinary memory of the parameters' device."""

    kind = "resident"
    prefetched_bytes = 0

    def __init__(self, nbytes: int, chunks: tuple[Chunk, ...], device: torch.device) -> None:
        self.arena = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.replan(chunks)

    def replan(self, chunks: tuple[Chunk, ...]) -> None:
        self.chunks = chunks
        self._segments = [segment_table(chunk.segments).to(self.arena.device) for chunk in chunks]

    def run(self, active: Sequence[int], update: Update) -> None:
        for index in active:
            update(self.chunks[index], self.arena, self._segments[index])

    def settle(self) -> None:
        """Do nothing: resident memory is always current."""

    def resident_bytes(self) -> int:
        return self.arena.nbytes


def segment_table(segments: Sequence[Segment]) -> Tensor:
    """Return the segments as int64 [n_segments, 8], the kernel's format."""
    return torch.tensor(segments, dtype=torch.int64).view(-1, len(SEGMENT_COLUMNS))
