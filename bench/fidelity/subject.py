"""The model and text for measuring claims: SmolLM2-135M and the demo's unseen text, or tiny replacements."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from qlora_kernels.integrations.transformers import convert_gguf, load_model, load_tokenizer, resolve_model
from qlora_kernels.io.model_cache import cached_folder
from qlora_kernels.training import ChunkedLoss, Example, encode, language_reference, perplexity

from ..machine import ROOT

CACHE = ROOT / "out" / "fidelity"
"""Folder, ignored by git, for the model in 16 bits."""

WINDOW, WINDOWS, BATCH = 256, 16, 4
"""Tokens of a window, number of evaluated windows and windows per batch, as in `make demo`."""


@dataclass(frozen=True)
class Text:
    """Windows of tokens for training, and held-out windows."""

    train: list[Example]
    unseen: list[Example]


def model(quick: bool) -> nn.Module:
    """Return a new causal language model in bf16 and eval mode: SmolLM2-135M, or two tiny random blocks."""
    return _tiny_model() if quick else load_model(_smollm2())


@cache
def text(quick: bool) -> Text:
    """Return Python's language reference as tokens, every eighth topic held out; random tokens for the tiny model."""
    if quick:
        torch.manual_seed(0)
        windows = [Example(ids, ids) for ids in torch.randint(_TINY_VOCABULARY, (6, 16))]
        return Text(windows[2:], windows[:2])
    corpus, tokenizer = language_reference(), load_tokenizer(_smollm2())
    unseen = encode(corpus.source, corpus.unseen, tokenizer, WINDOW)[:WINDOWS]
    return Text(encode(corpus.source, corpus.train, tokenizer, WINDOW), unseen)


def perplexity_of(subject: nn.Module, quick: bool) -> float:
    """Return the model's perplexity over the held-out windows."""
    return perplexity(ChunkedLoss(subject), text(quick).unseen, BATCH).value


def linears(subject: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that QLoRA quantizes, all but the output head, by name."""
    return {
        name: module for name, module in subject.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


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
