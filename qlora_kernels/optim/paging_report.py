"""PagingReport: where an optimizer's states are stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PagingReport:
    """The location of the states, in bytes; str() gives one line."""

    kinds: tuple[str, ...]
    """The kind of each arena: resident, mapped, managed or staged."""
    parameters: int
    state_bytes: int
    resident_bytes: int | None
    """Bytes in the memory where they are used; None if the system does not report it."""
    paged_bytes: int | None
    """The remaining bytes: on disk, or in host memory."""
    prefetched_bytes: int
    """Bytes fetched in advance since the optimizer was made."""
    chunks: int
    look_ahead: int

    def __str__(self) -> str:
        resident = "unknown" if self.resident_bytes is None else f"{self.resident_bytes:,}"
        return (
            f"{self.state_bytes:,} bytes of states for {self.parameters:,} parameters in {self.chunks} chunks "
            f"({', '.join(self.kinds) or 'none'}): {resident} resident, {self.prefetched_bytes:,} prefetched"
        )
