"""The order of examples, as a function of the step, and their collation into batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .windows import IGNORED, Example


class Batch(NamedTuple):
    """input_ids, labels: int64 [B, T].   attention_mask: bool [B, T], or None if nothing is padded."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; page-locked memory is copied without waiting."""
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]

    @property
    def learned_tokens(self) -> int:
        """Return the number of predictions that count in the loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())


class BatchOrder:
    """A new permutation of the examples for each epoch; without state, so that a resumed run needs only the step."""

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        self.n_examples = n_examples
        self.batch_size = batch_size
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._permuted)

    def indices(self, step: int) -> list[int]:
        """Return the examples of step 0, 1, ...; a batch may end one epoch and begin the next."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._permutation(p // self.n_examples)[p % self.n_examples] for p in positions]

    def _permuted(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order: list[int] = torch.randperm(self.n_examples, generator=generator).tolist()
        return order


def collate(examples: Sequence[Example], pad_token_id: int = 0) -> Batch:
    """Return one batch, padded on the right to its longest example, on the device of the examples."""
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    device = examples[0].input_ids.device
    input_ids = torch.full(shape, pad_token_id, device=device)
    labels = torch.full(shape, IGNORED, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
        mask[row, :length] = True
    return Batch(input_ids, labels, None if bool(mask.all()) else mask)
