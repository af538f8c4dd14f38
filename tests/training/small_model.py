"""A small model with an embedding, a linear layer and a head."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

VOCABULARY, HIDDEN = 37, 16


class Model(nn.Module):
    """An embedding, a linear layer and a head; `cap` bounds the logits after the head, as some architectures do."""

    def __init__(self, cap: float | None = None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.cap = cap
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, module: nn.Module) -> None:
        self.head = module

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        logits = self.head(torch.tanh(self.mix(self.embedding(input_ids))))
        return SimpleNamespace(logits=logits if self.cap is None else self.cap * torch.tanh(logits / self.cap))
