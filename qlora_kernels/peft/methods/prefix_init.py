"""Initialization of prefixes with the keys and values of given tokens.

Source: Prefix-Tuning (arXiv:2101.00190) section 7.4: activations of words that are relevant to the task, for little
training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...nn.module_tree import input_embeddings_of
from ..attention.prefix_slot import SLOT, PrefixSlot
from ..framework.injector import Injector
from ..layers.base_layer import device_of


@torch.no_grad()
def prefix_of_tokens(injector: Injector, attentions: Sequence[str], ids: Sequence[int]) -> Tensor:
    """Return the keys and values that the base model's attentions compute for n tokens.

    The result has shape [n, n_attentions * 2 * heads_kv * head_dim], in the order of a flat prefix. Keys are rotated,
    for positions 0 to n - 1.

    Raises ValueError for a model that has an encoder and a decoder, or that does not take input_ids.
    """
    if injector.layout.seq2seq or input_embeddings_of(injector.model) is None:
        raise ValueError("init_token_ids: the model must be a decoder or an encoder that takes input_ids")
    slots = [cast(PrefixSlot, getattr(injector.module(path), SLOT)) for path in attentions]
    training = injector.model.training
    try:
        for slot in slots:
            slot.seen = []
        with injector.selection.disabled():
            injector.model.eval()(torch.tensor([list(ids)], device=device_of(injector.model)))
        pairs = [pair for slot in slots for pair in slot.seen or ()]
    finally:
        injector.model.train(training)
        for slot in slots:
            slot.seen = None
    # [1, heads, n, head_dim] each -> [n, layers, 2, heads, head_dim]
    return torch.stack([torch.stack([t[0].transpose(0, 1) for t in pair], 1) for pair in pairs], 1).flatten(1)
