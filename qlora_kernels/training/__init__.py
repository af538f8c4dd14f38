"""Supervised fine-tuning of causal language models: tokenized windows, a loss with small logits, the training loop.

Any model works whose forward takes `input_ids` and returns an object with `logits`.
"""

from .batches import BatchOrder, collate
from .chat_text import write_chat
from .chunked_loss import ChunkedLoss
from .corpus import Corpus, language_reference, read_corpus, read_data
from .dataset_rows import is_dataset
from .evaluate import Perplexity, perplexity
from .loop import Interrupted, train
from .packing import keeps_apart, pack
from .records import Chat, Completion, DataError, Plain, Record
from .text_tokens import TextTokens
from .train_config import StepRecord, TrainConfig
from .validation import Evaluated, Validation
from .windows import Encoding, Example, RowCounts, encode, encode_rows
from .workers import LostWorkerError, Workers, joined

__all__ = [
    "BatchOrder",
    "Chat",
    "ChunkedLoss",
    "Completion",
    "Corpus",
    "DataError",
    "Encoding",
    "Evaluated",
    "Example",
    "Interrupted",
    "LostWorkerError",
    "Perplexity",
    "Plain",
    "Record",
    "RowCounts",
    "StepRecord",
    "TextTokens",
    "TrainConfig",
    "Validation",
    "Workers",
    "collate",
    "encode",
    "encode_rows",
    "is_dataset",
    "joined",
    "keeps_apart",
    "language_reference",
    "pack",
    "perplexity",
    "read_corpus",
    "read_data",
    "train",
    "write_chat",
]
