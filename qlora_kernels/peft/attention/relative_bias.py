"""T5's relative position bias for a prefix that has positions."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

_SETTINGS = ("is_decoder", "relative_attention_num_buckets", "relative_attention_max_distance")


class RelativeBias(nn.Module):
    """Bias of queries after n prefix positions: [1, heads, queries, n].

    It is computed by `attention`, the layer that owns the table. The table is a child of this module, because other
    layers use it too and each replica of the model has its own.
    """

    of_base_model = True  # the parameters below it belong to the model

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name in _SETTINGS:
            setattr(self, name, getattr(attention, name))
        self.relative_attention_bias = attention.relative_attention_bias
        self.attention_type = cast(Any, type(attention))
        self._relative_position_bucket = self.attention_type._relative_position_bucket

    def forward(self, queries: int, n: int, past: int) -> Tensor:
        bias: Tensor = self.attention_type.compute_bias(self, queries, n, past_seen_tokens=n + past)
        return bias


def bias_source(first_attention: nn.Module) -> RelativeBias | None:
    """Return the first layer's table, which all layers of a T5 stack use; None for models without one."""
    has_table = getattr(first_attention, "has_relative_attention_bias", False)
    return RelativeBias(first_attention) if has_table else None
