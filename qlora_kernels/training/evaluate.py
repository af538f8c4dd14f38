"""Perplexity."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .batches import collate
from .chunked_loss import ChunkedLoss
from .windows import Example
from .workers import Workers

_LARGEST = math.log(sys.float_info.max)


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
    workers: Workers | None = None,
) -> Perplexity:
    """Of loss.model, in eval mode, over `examples`. The sums are taken in fp64, in the examples' order.

    workers: the processes that share the batches; each gets the same result, which is that of one process.
    Raises FloatingPointError where it is not a number of float64.
    """
    training = loss.model.training
    loss.model.eval()
    workers = workers or Workers()
    of_batch: dict[int, tuple[float, int]] = {}  # start of a batch -> its loss and its learned tokens
    for start in workers.share(range(0, len(examples), batch_size)):
        batch = collate(examples[start : start + batch_size], pad_token_id)
        of_batch[start] = loss(batch).item(), batch.learned_tokens
        on_batch()
    loss.model.train(training)
    for others in workers.gathered(of_batch):
        of_batch |= others
    total, tokens = 0.0, 0
    for start in sorted(of_batch):
        total += of_batch[start][0]
        tokens += of_batch[start][1]
    mean = total / tokens
    if not mean < _LARGEST:  # NaN too
        raise FloatingPointError(f"perplexity: the loss must be below {_LARGEST:.0f} nats a token, got {mean}")
    return Perplexity(math.exp(mean), tokens)
