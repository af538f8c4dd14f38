"""PromptLayout: the positions of soft prompts of different lengths before the tokens of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptLayout:
    """The layout of a batch whose rows become [prompt, tokens], padded to one length.

    front: [B, n, d], each row's prompt and padding, where n is the longest prompt. lengths: [B], lengths of the
    prompts.
    side: position of the padding. It is "left" of the prompt for decoders, and "right" of the tokens for encoders,
    whose first position has a meaning (BERT's classifiers read it).
    """

    front: Tensor
    lengths: Tensor
    side: Literal["left", "right"]
    ragged: bool

    @classmethod
    def of(cls, prompts: Sequence[Sequence[Tensor]], side: Literal["left", "right"]) -> PromptLayout:
        """Return the layout of `prompts`, which lists for each row its prompts, [n_i, d] each, in order."""
        distinct = {id(p): p for row in prompts for p in row}
        some = next(iter(distinct.values()))
        table = torch.cat([*distinct.values(), some.new_zeros(1, some.shape[1])])
        starts, start = {}, 0
        for key, prompt in distinct.items():
            starts[key], start = start, start + prompt.shape[0]
        rows = [[starts[id(p)] + i for p in row for i in range(p.shape[0])] for row in prompts]
        n = max(map(len, rows))
        filling = table.shape[0] - 1
        full = [([filling] * (n - len(r)) + r) if side == "left" else (r + [filling] * (n - len(r))) for r in rows]
        lengths = torch.tensor([len(r) for r in rows], device=table.device)
        return cls(table[torch.tensor(full, device=table.device)], lengths, side, len(set(map(len, rows))) > 1)

    @property
    def n(self) -> int:
        """The number of positions before the tokens of a row, padding included."""
        return self.front.shape[1]

    @property
    def filling(self) -> Tensor:
        """The number of padded positions of each row, [B, 1]."""
        return self.n - self.lengths[:, None]

    def visible(self) -> Tensor:
        """Bool [B, n], True where `front` is prompt and not padding."""
        at = torch.arange(self.n, device=self.front.device)
        return at >= self.filling if self.side == "left" else at < self.lengths[:, None]

    def join(self, front: Tensor, x: Tensor) -> Tensor:
        """Join front [B, n, ...] and tokens [B, S, ...] in the layout's order, [B, n + S, ...]."""
        joined = torch.cat([front.to(x.dtype), x], dim=1)
        if self.side == "left" or not self.ragged:
            return joined
        return _gather(joined, self._order(x.shape[1]))

    def fill(self, x: Tensor, value: int) -> Tensor:
        """Return x [B, S] joined with `value` at all positions of `front`."""
        return self.join(x.new_full((x.shape[0], self.n), value), x)

    def mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Return the attention mask [B, S] (1 is visible) extended to the joined rows; None if all positions are
        visible.
        """
        if attention_mask is None:
            if not self.ragged:
                return None
            attention_mask = torch.ones(self.front.shape[0], length, dtype=torch.long, device=self.front.device)
        return self.join(self.visible(), attention_mask)

    def tokens(self, y: Tensor) -> Tensor:
        """Return the tokens [B, S, ...] of joined rows [B, n + S, ...]."""
        if self.side == "left" or not self.ragged:
            return y[:, self.n :]
        return _gather(y, self.lengths[:, None] + torch.arange(y.shape[1] - self.n, device=y.device))

    def _order(self, length: int) -> Tensor:
        """Return [B, n + S]: the index in [prompt, filling, tokens] of each position of [prompt, tokens, filling]."""
        at, own = torch.arange(self.n + length, device=self.front.device), self.lengths[:, None]
        return torch.where(at < own, at, torch.where(at < own + length, at + self.n - own, at - length))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return x[b, index[b, i]] for all b and i."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
