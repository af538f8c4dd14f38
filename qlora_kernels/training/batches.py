"""The order of examples, as a function of the step, and their collation into batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .windows import IGNORED, Example


class Batch(NamedTuple):
    """The tensors of several examples, padded to one length.

    input_ids, labels: int64 [B, T].   attention_mask: bool [B, T], or None if nothing is padded.
    position_ids: int64 [B, T] of packed windows, which begin at 0 with each example; then attention_mask is None. From
    these, transformers' models build the mask that keeps the examples, and the padding, apart.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None = None

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
    if any(example.lengths is not None for example in examples):
        return _collate_packed(examples, pad_token_id)
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


def _collate_packed(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Return a batch of packed windows; the padding of a window is one more example without learned tokens."""
    longest = max(len(example.input_ids) for example in examples)
    device = examples[0].input_ids.device
    input_ids = torch.full((len(examples), longest), pad_token_id, device=device)
    labels = torch.full_like(input_ids, IGNORED)
    position_ids = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
        lengths = example.lengths or (length,)
        padding = (longest - length,) if longest > length else ()
        position_ids[row] = torch.cat([torch.arange(n, device=device) for n in (*lengths, *padding)])
    return Batch(input_ids, labels, None, position_ids)
