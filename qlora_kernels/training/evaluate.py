"""Perplexity of a model on held-out examples."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .batches import collate
from .chunked_loss import ChunkedLoss
from .sharded_model import in_equal_numbers, is_sharded, reshard
from .windows import Example
from .workers import Workers

_LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Perplexity:
    """A perplexity over several examples.

    value: exp of the mean negative log-likelihood.   tokens: number of predictions in the mean.
    """

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
    """Return the perplexity of loss.model, in eval mode, on `examples`, summed in fp64 in the examples' order.

    workers: the processes that share the batches; each gets the same result, equal to that of one process.
    Raises FloatingPointError if the result is not a finite float64.
    """
    training = loss.model.training
    loss.model.eval()
    workers = workers or Workers()
    of_batch: dict[int, tuple[float, int]] = {}  # start of a batch -> (its loss, its learned tokens)
    starts = range(0, len(examples), batch_size)
    own = workers.share(starts)
    # All processes of a sharded model run equally many forwards; the result of an additional one is not used.
    every = in_equal_numbers(own, len(starts), workers.world, 0) if is_sharded(loss.model) else own
    for number, start in enumerate(every):
        batch = collate(examples[start : start + batch_size], pad_token_id)
        value = loss(batch).item()
        if number < len(own):
            of_batch[start] = value, batch.learned_tokens
            on_batch()
    reshard(loss.model)
    loss.model.train(training)
    for others in workers.gathered(of_batch):
        of_batch |= others
    total, tokens = 0.0, 0
    for start in sorted(of_batch):
        total += of_batch[start][0]
        tokens += of_batch[start][1]
    mean = total / tokens
    if not mean < _LARGEST:  # also true for NaN
        raise FloatingPointError(f"perplexity: the loss must be below {_LARGEST:.0f} nats a token, got {mean}")
    return Perplexity(math.exp(mean), tokens)
