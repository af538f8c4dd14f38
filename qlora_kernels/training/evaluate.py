"""Perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .batches import collate
from .chunked_loss import ChunkedLoss
from .windows import Example


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood.   tokens: the predictions that it is the mean of."""

    value: float
    tokens: int


@torch.no_grad()
def perplexity(
    loss: ChunkedLoss,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int = 0,
    on_batch: Callable[[], object] = lambda: None,
) -> Perplexity:
    """Of loss.model, in eval mode, over `examples`. The sums are taken in fp64, in the examples' order."""
    training = loss.model.training
    loss.model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_token_id)
        total += loss(batch).item()
        tokens += batch.learned_tokens
        on_batch()
    loss.model.train(training)
    return Perplexity(math.exp(total / tokens), tokens)
