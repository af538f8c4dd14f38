"""Where an optimizer's states are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PagingReport:
    """Where the states are, in bytes. `print(report)` shows it in a line."""

    kinds: tuple[str, ...]
    """Of each arena: resident, mapped, managed or staged."""
    parameters: int
    state_bytes: int
    resident_bytes: int | None
    """In the memory where they are used; None where the system does not say."""
    paged_bytes: int | None
    """The rest: on disk, or on the host's side of unified memory."""
    prefetched_bytes: int
    """Fetched ahead of their use since the optimizer was made."""
    chunks: int
    look_ahead: int

    def __str__(self) -> str:
        resident = "unknown" if self.resident_bytes is None else f"{self.resident_bytes:,}"
        return (
            f"{self.state_bytes:,} bytes of states for {self.parameters:,} parameters in {self.chunks} chunks "
            f"({', '.join(self.kinds) or 'none'}): {resident} resident, {self.prefetched_bytes:,} prefetched"
        )
