"""Supervised fine-tuning of causal language models: text to windows, a loss that keeps logits small, the training loop.

Plain PyTorch: any model whose forward takes `input_ids` and returns an object with `logits` will do.
"""

from .batches import BatchOrder, collate
from .chunked_loss import ChunkedLoss
from .corpus import Corpus, language_reference, read_corpus
from .evaluate import Perplexity, perplexity
from .loop import StepRecord, TrainConfig, train
from .records import Chat, Completion, DataError, Plain
from .windows import Example, encode

__all__ = [
    "BatchOrder",
    "Chat",
    "ChunkedLoss",
    "Completion",
    "Corpus",
    "DataError",
    "Example",
    "Perplexity",
    "Plain",
    "StepRecord",
    "TrainConfig",
    "collate",
    "encode",
    "language_reference",
    "perplexity",
    "read_corpus",
    "train",
]
