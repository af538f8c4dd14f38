"""Which adapters speak in a forward: one object per PeftModel, read by every adapted layer and hook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = "__base__"  # PEFT's name for a row that no adapter touches


@dataclass
class Selection:
    """`active`: adapters whose contributions add up.   `rows`: one adapter name per row of the batch, or None.

    `padding`: [B, S], 1 where a token is real; the model's own attention_mask, for gates that average over tokens.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    rows: tuple[str, ...] | None = None
    padding: Tensor | None = None

    def has(self, name: str) -> bool:
        if not self.enabled:
            return False
        return name in self.rows if self.rows is not None else name in self.active

    def row_index(self, name: str, x: Tensor) -> Tensor | None:
        """Rows of x that belong to adapter `name`; None = all of them. Call only where has(name)."""
        if self.rows is None:
            return None
        return torch.tensor([i for i, row in enumerate(self.rows_of(x.shape[0])) if row == name], device=x.device)

    def owners(self, names: Sequence[str], x: Tensor) -> Tensor | None:
        """For each row of x the place of its adapter in names, -1 if it is none of them; None without rows."""
        if self.rows is None:
            return None
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place.get(row, -1) for row in self.rows_of(x.shape[0])], device=x.device)

    def rows_of(self, batch: int) -> tuple[str, ...]:
        """`rows` stretched to `batch`: beams and flattened tokens repeat each row of the batch."""
        rows = self.rows or ()
        repeats, rest = divmod(batch, max(len(rows), 1))
        if rest:
            raise ValueError(f"adapter_names: must be one per row of the batch, {batch}, got {len(rows)}")
        return tuple(name for name in rows for _ in range(repeats))

    @contextmanager
    def for_call(self, rows: Sequence[str] | None, padding: Tensor | None) -> Iterator[None]:
        before = self.rows, self.padding
        self.rows, self.padding = (tuple(rows) if rows is not None else None), padding
        try:
            yield
        finally:
            # Gradient checkpointing runs the layers again in backward, after this call has returned: a training step's
            # rows stay until the next call, only inference forgets them here.
            if not torch.is_grad_enabled():
                self.rows, self.padding = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before
