"""T5's relative position bias for a prefix that has positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn


@dataclass
class RelativeBias:
    """Bias of queries after n prefix positions: [1, heads, queries, n].   attention: the layer that owns the table."""

    attention: nn.Module

    def __call__(self, queries: int, n: int, past: int) -> Tensor:
        bias: Tensor = cast(Any, self.attention).compute_bias(queries, n, past_seen_tokens=n + past)
        return bias


def bias_source(first_attention: nn.Module) -> RelativeBias | None:
    """The first layer's table serves all layers of a T5 stack; None for models without one."""
    has_table = getattr(first_attention, "has_relative_attention_bias", False)
    return RelativeBias(first_attention) if has_table else None
