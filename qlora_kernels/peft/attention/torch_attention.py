"""torch's nn.MultiheadAttention with separate projections, which methods can adapt, instead of the packed one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.module_tree import move_hooks, names_of, set_submodule
from ..core.adapter_selection import AdapterSelection
from ..layers.adapted_linear import base_of
from .prefix_slot import PrefixSlot, extend_mask


class SplitAttention(nn.Module):
    """Computes nn.MultiheadAttention, with its signature, from q_proj, k_proj, v_proj and out_proj.

    The packed original computes with raw weights, so that wrapped layers and prefixes have no effect, and torch's
    encoder layers have a fast path that reads the weights directly. The projections here are views of the same storage
    until one of them is cast, moved or merged.
    """

    # nn.TransformerEncoderLayer reads this attribute; False disables its fast path.
    _qkv_same_embed_dim = False
    in_proj_bias = None
    is_causal = False

    reads_prefix_slot = True  # without transformers' attention interface

    def __init__(self, packed: nn.MultiheadAttention, selection: AdapterSelection) -> None:
        super().__init__()
        self.selection = selection
        self.embed_dim, self.num_heads, self.head_dim = packed.embed_dim, packed.num_heads, packed.head_dim
        self.dropout, self.batch_first = packed.dropout, packed.batch_first
        separate = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        weights = packed.in_proj_weight.chunk(3) if packed._qkv_same_embed_dim else cast("tuple[Tensor, ...]", separate)
        biases = packed.in_proj_bias.chunk(3) if packed.in_proj_bias is not None else (None, None, None)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = packed.out_proj
        # The original is kept outside the module tree, without its parameters until join() restores them.
        packed._parameters, packed._modules = dict.fromkeys(packed._parameters), {}
        self.shell = (packed,)
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
        if not self.selection.state.enabled and not torch.compiler.is_compiling():
            # One matmul for three projections has other roundings than three matmuls, so the original computes the
            # base.
            original = copy.copy(self.shell[0])
            original._parameters, original._modules = dict(original._parameters), {}
            if self._fill(original):
                masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
                return original(query, key, value, *masks)  # type: ignore[no-any-return]
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(p, t) for p, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value)))
        mask = _merged_mask(attn_mask, key_padding_mask, q)
        slot: PrefixSlot | None = getattr(self, "prefix_slot", None)
        prefix = slot.read(k, v) if slot is not None else None
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

    def join(self) -> nn.MultiheadAttention | None:
        """Return the original module with the present weights, or None if a weight is no longer dense, as after a merge
        with target="nf4".
        """
        return self.shell[0] if self._fill(self.shell[0]) else None

    def _fill(self, packed: nn.MultiheadAttention) -> bool:
        """Give `packed` the present weights, if they are dense; they are not copied while they are consecutive in
        memory.
        """
        projections = [base_of(module) for module in (self.q_proj, self.k_proj, self.v_proj)]
        if not all(isinstance(projection, nn.Linear) for projection in projections):
            return False
        weights = [cast(nn.Linear, projection).weight for projection in projections]
        biases = [cast("Tensor | None", projection.bias) for projection in projections]
        if packed._qkv_same_embed_dim:
            packed.in_proj_weight = _parameter(_side_by_side(weights))
        else:
            for name, weight in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights, strict=True):
                setattr(packed, name, _parameter(weight))
        if any(bias is not None for bias in biases):  # after a merge some may have no view
            rows = zip(biases, weights, strict=True)
            packed.in_proj_bias = _parameter(_side_by_side([w.new_zeros(len(w)) if b is None else b for b, w in rows]))
        packed.out_proj = base_of(self.out_proj)  # type: ignore[assignment]
        packed.training = self.training
        return True

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Split the heads: [B, S, E] -> [B, heads, S, head_dim]."""
        y: Tensor = projection(x)
        return y.view(*y.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _merged_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return both masks of nn.MultiheadAttention (bool: True is hidden; float: added) as one float mask to add, or
    None.
    """
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


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return torch.cat(parts), without a copy if the parts are already consecutive in one storage."""
    first = parts[0].detach()
    place = first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != place:
            return torch.cat([part.detach() for part in parts])
        place += part.numel()
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def split_attention(model: nn.Module, selection: AdapterSelection) -> None:
    """Replace every nn.MultiheadAttention of the model that can be split by a SplitAttention.

    Nested tensors are disabled in torch's encoders, because they lead to a fast path that ignores adapters.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            module.use_nested_tensor = False
            module.nested_tensor_before_adapters = True  # type: ignore[assignment]
        if isinstance(module, nn.MultiheadAttention) and module.bias_k is None and not module.add_zero_attn:
            names = names_of(model, module)
            split = SplitAttention(module, selection)
            move_hooks(module, split)
            for name in names:
                set_submodule(model, name, split)


def join_attention(model: nn.Module) -> None:
    """Undo split_attention: restore the nn.MultiheadAttention modules, with the present weights."""
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoder) and "nested_tensor_before_adapters" in vars(module):
            del module.nested_tensor_before_adapters
            module.use_nested_tensor = True
        if isinstance(module, SplitAttention) and (packed := module.join()) is not None:
            move_hooks(module, packed)
            for name in names_of(model, module):
                set_submodule(model, name, packed)
