"""Checks before any work that the model and this machine support the token ids, positions and memory of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .arguments import UsageError
from .device import memory_bytes
from .tokenizing import ModelTokenizer

CPU = torch.device("cpu")


def check_token_ids(largest: int, tokenizer: ModelTokenizer, model: nn.Module) -> None:
    """Raise UsageError if the tokenizer belongs to another model, or a token of the text has no row in the embedding.

    Tokens that were added to a tokenizer (for padding, for images) may be beyond the embedding if no text contains
    them.
    largest: the largest token id of the text. model: its weights may be on the meta device.
    """
    rows = embedding_rows(model)
    if tokenizer.vocab_size > rows:
        raise UsageError(
            f"the tokenizer's vocabulary must fit the {rows} rows of the model's embedding, got {tokenizer.vocab_size} "
            "tokens; use the model's own tokenizer, or resize its embedding and save it"
        )
    if largest >= rows:
        raise UsageError(
            f"the tokenizer must only give ids below {rows}, the rows of the model's embedding, got {largest} for "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}; resize the model's embedding and save it"
        )


def check_positions(longest: int, model: nn.Module, option: str) -> None:
    """Raise UsageError if a text of `longest` tokens exceeds the model's number of positions.

    option: name of the option that sets the length, for the message.
    """
    most = max_positions(model)
    if most is not None and longest > most:
        raise UsageError(f"{option}: must leave at most {most} tokens, the model's positions, got {longest}")


def check_memory(model: nn.Module, *, batch: int, micro_batch: int, longest: int, device: torch.device = CPU) -> None:
    """Raise UsageError if a training step cannot fit into this machine's memory.

    Memory is bounded from below, by the input of every layer for the backward pass, so that a step that passes may
    still be too large.
    batch: examples of a step. micro_batch: examples in memory at one time. longest: tokens of an example.
    device: where the model is; ids and labels of the whole batch are on the CPU.
    """
    config = _text_config(model)
    layers = getattr(config, "num_hidden_layers", None) or 1
    width = getattr(config, "hidden_size", None) or 1
    activations = micro_batch * longest * layers * width * 2
    ids_and_labels = batch * longest * 16
    for option, needed, place in (
        ("--batch", ids_and_labels, CPU),
        ("--micro-batch (or --batch, without it)", activations, device),
    ):
        memory = memory_bytes(place)
        if needed > memory:
            examples = batch if option == "--batch" else micro_batch
            raise UsageError(
                f"{option}: must fit {_place(place)}'s memory of {memory / 1e9:,.0f} GB, got {examples} examples of "
                f"{longest} tokens, which take at least {needed / 1e9:,.0f} GB; use fewer, or a shorter --seq-len"
            )


def check_rank(model: nn.Module, rank: int, device: torch.device = CPU) -> None:
    """Raise UsageError if low-rank factors on every linear layer cannot fit into the memory of `device`."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    needed = 4 * rank * sum(linear.in_features + linear.out_features for linear in linears)
    if needed > (memory := memory_bytes(device)):
        raise UsageError(
            f"--r: must fit {_place(device)}'s memory of {memory / 1e9:,.0f} GB, got {rank}, whose factors take "
            f"{needed / 1e9:,.0f} GB"
        )


def embedding_rows(model: nn.Module) -> int:
    """Return the number of token ids of the model."""
    return len(model.get_input_embeddings().weight)  # type: ignore[operator]


def max_positions(model: nn.Module) -> int | None:
    """Return the model's maximum number of tokens; None if its configuration sets no bound."""
    most = getattr(_text_config(model), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # type: ignore[operator,union-attr]


def _place(device: torch.device) -> str:
    return "this machine" if device.type == "cpu" else str(device)
