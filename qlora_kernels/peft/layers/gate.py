"""Gate: a scalar in (0, 1), computed from the input, that scales the contribution of a method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.adapter_selection import AdapterSelection


class Gate(nn.Module):
    """g = sigmoid(w . h + b), w ~ N(0, 0.02), b = 0: one half at the start.

    h [B, S, d] -> [B, 1, 1], the mean over a row's tokens without padding; with per_token -> [B, S, 1], for decoders,
    in which the value of a token must depend neither on later tokens nor on the other inputs of the call.
    """

    def __init__(self, d: int, per_token: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(d, 1, device=device, dtype=dtype)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.per_token = per_token

    def forward(self, h: Tensor, padding: Tensor | None) -> Tensor:
        """Compute the gate of h. padding [B, S]: 1 for tokens and 0 for padding, or None."""
        g = torch.sigmoid(self.linear(h.to(self.linear.weight.dtype)))
        if self.per_token:
            return g
        if padding is None:
            return g.mean(1, keepdim=True)
        weight = padding[..., None].to(g.dtype)
        return (g * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def padding_of(selection: AdapterSelection, name: str, h: Tensor) -> Tensor | None:
    """Return the rows of the call's padding mask that belong to h, a batch of only adapter `name`'s rows, or None."""
    padding = selection.state.padding
    if padding is None:
        return None
    if selection.state.rows is not None and h.shape[0] != padding.shape[0]:
        own = [i for i, row in enumerate(selection.rows_of(padding.shape[0])) if row == name]
        padding = padding[own]
    return padding if padding.shape == h.shape[:2] else None
