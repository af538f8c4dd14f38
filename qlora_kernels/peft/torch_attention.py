"""torch's nn.MultiheadAttention with its packed projections taken apart, so that methods can reach into it."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .prefix_slot import PrefixSlot, extend_mask
from .selection import Selection


class SplitAttention(nn.Module):
    """nn.MultiheadAttention's function and signature over q_proj, k_proj, v_proj and out_proj.

    The packed original computes with raw weights, where neither a wrapped layer nor a prefix can act, and torch's
    encoder layers have a fast path that reads them directly. The projections here are views of the same storage.
    """

    # What nn.TransformerEncoderLayer asks before it takes its fast path: this says no.
    _qkv_same_embed_dim = False
    in_proj_bias = None
    is_causal = False

    def __init__(self, packed: nn.MultiheadAttention, selection: Selection) -> None:
        super().__init__()
        self.packed = [packed]  # kept aside, outside the module tree
        self.selection = selection
        self.num_heads, self.head_dim = packed.num_heads, packed.head_dim
        self.dropout, self.batch_first = packed.dropout, packed.batch_first
        separate = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        weights = packed.in_proj_weight.chunk(3) if packed._qkv_same_embed_dim else cast("tuple[Tensor, ...]", separate)
        biases = packed.in_proj_bias.chunk(3) if packed.in_proj_bias is not None else (None, None, None)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = packed.out_proj
        self.prefix_slot: PrefixSlot | None = None
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.selection.enabled:
            # One matmul for three projections rounds otherwise than three: the base exactly is the original's business.
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return self.packed[0].train(self.training)(query, key, value, *masks)  # type: ignore[no-any-return]
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(p, t) for p, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value)))
        mask = _merged_mask(attn_mask, key_padding_mask, q)
        prefix = self.prefix_slot.read(k, v) if self.prefix_slot is not None else None
        if prefix is not None:
            mask = extend_mask(mask, prefix, q, k, causal=False)
            q, k, v = prefix.join(q, k, v)
        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.head_dim**-0.5)
        heads = heads.transpose(1, 2)
        y: Tensor = self.out_proj((heads if prefix is None else prefix.out(heads)).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """[B, S, E] -> [B, heads, S, head_dim]."""
        y: Tensor = projection(x)
        return y.view(*y.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _merged_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both of nn.MultiheadAttention's masks (bool: True is hidden; float: added) as one float mask to add, or None."""
    parts = []
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, q.dtype)
        per_head = attn_mask.dim() == 3  # [B * heads, S, S]
        parts.append(attn_mask.view(*q.shape[:2], *attn_mask.shape[1:]) if per_head else attn_mask[None, None])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)
        parts.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
    return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def split(module: nn.Module, selection: Selection) -> nn.Module:
    """`module` taken apart if it is an nn.MultiheadAttention that can be."""
    if isinstance(module, nn.MultiheadAttention) and module.bias_k is None and not module.add_zero_attn:
        return SplitAttention(module, selection)
    return module


def rejoin(module: nn.Module) -> nn.Module:
    """The nn.MultiheadAttention that `module` was made from, if it was and still holds its weights."""
    if not isinstance(module, SplitAttention):
        return module
    packed = module.packed[0]
    views = (module.q_proj, module.k_proj, module.v_proj)
    rows = packed.in_proj_weight if packed._qkv_same_embed_dim else packed.q_proj_weight
    same = all(isinstance(view, nn.Linear) for view in views) and views[0].weight.data_ptr() == rows.data_ptr()
    return packed if same and module.out_proj is packed.out_proj else module
