"""What a memory for optimizer states is, and the simplest one: bytes that are always there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..ops.adamw_step import SEGMENT_COLUMNS, Segment
from .paging_plan import Chunk

Update = Callable[[Chunk, Tensor, Tensor], None]
"""update(chunk, arena, segments): run the kernel on one chunk, with the bytes and the rows that describe it there."""


class StateMemory(Protocol):
    """One arena of bytes, zero at first, and the way to step through its chunks. Freed with its last reference."""

    kind: str
    arena: Tensor
    """uint8 [nbytes]: what the optimizer's state tensors are views of."""
    chunks: tuple[Chunk, ...]
    prefetched_bytes: int
    """Fetched ahead of their use since the beginning."""

    def run(self, active: Sequence[int], update: Update) -> None:
        """Call `update` on each active chunk in order, its bytes fetched ahead."""
        ...

    def replan(self, chunks: tuple[Chunk, ...]) -> None:
        """Step through other chunks of the same arena from now on."""
        ...

    def settle(self) -> None:
        """Return when the arena may be read and written through its tensors."""
        ...

    def resident_bytes(self) -> int | None:
        """Bytes of the arena in the memory where they are used; None where the system does not say."""
        ...


class ResidentMemory:
    """Plain memory of the parameters' device."""

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
    """int64 [n_segments, 8], as the kernel reads them."""
    return torch.tensor(segments, dtype=torch.int64).view(-1, len(SEGMENT_COLUMNS))
