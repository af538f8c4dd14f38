"""RMSNorm and decoder layers of transformers' models on the rms_norm op, which also adds the residual."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..ops.residual_block import BlockNorm
from ..ops.rms_norm import rms_norm
from .fused_attention import FusedAttention
from .fused_mlp import FusedMLP
from .fused_module import FusedModule, served
from .module_tree import has_hooks


class FusedRMSNorm(FusedModule):
    """A root mean square norm over the last dimension, with `weight` and an eps."""

    weight: Tensor
    eps_name: ClassVar[str]
    """Name of the attribute that holds eps."""
    weight_offset: ClassVar[float]
    """Value that the op adds to the weight: 0 or 1."""

    def normalized(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual), x + residual)."""
        eps = getattr(self, self.eps_name)
        return rms_norm(x, self.weight, eps, residual=residual, weight_offset=self.weight_offset)


class FusedLlamaRMSNorm(FusedRMSNorm):
    """weight * normalized x: Llama, Qwen, Mistral."""

    eps_name = "variance_epsilon"
    weight_offset = 0.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not served(hidden_states, self.weight):
            return cast(Tensor, super().forward(hidden_states))
        return self.normalized(hidden_states)[0]


class FusedGemmaRMSNorm(FusedRMSNorm):
    """(1 + weight) * normalized x: Gemma."""

    eps_name = "eps"
    weight_offset = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if not served(x, self.weight):
            return cast(Tensor, super().forward(x))
        return self.normalized(x)[0]


class FusedDecoderLayer(FusedModule):
    """A decoder layer with a norm before attention and MLP; the second norm also adds the first residual."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:  # their order is defined by the original forward
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        hidden = self._attention_block(hidden_states, kwargs)
        if hidden is None:
            attended = _attended(self, hidden_states, kwargs)
            normalized, residual = _added_and_normalized(self.post_attention_layernorm, attended, hidden_states)
            return cast(Tensor, residual + self.mlp(normalized))
        output = self._mlp_block(hidden)
        return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden))) if output is None else output

    def _attention_block(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Return hidden + attention(norm(hidden)) from one autograd node, or None if this is not supported."""
        attention, norm = self.self_attn, _block_norm(self.input_layernorm, hidden)
        if norm is None or not isinstance(attention, FusedAttention) or has_hooks(attention):
            return None
        return attention.as_one_node(hidden, norm, **kwargs)

    def _mlp_block(self, hidden: Tensor) -> Tensor | None:
        """Return hidden + mlp(norm(hidden)) from one autograd node, or None if this is not supported."""
        mlp, norm = self.mlp, _block_norm(self.post_attention_layernorm, hidden)
        if norm is None or not isinstance(mlp, FusedMLP) or has_hooks(mlp):
            return None
        return mlp.as_one_node(hidden, norm)


class FusedSandwichDecoderLayer(FusedModule):
    """A decoder layer with norms before and after attention and MLP, as in Gemma 2 and 3."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module
    mlp: nn.Module
    post_feedforward_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        attended = self.post_attention_layernorm(_attended(self, hidden_states, kwargs))
        normalized, residual = _added_and_normalized(self.pre_feedforward_layernorm, attended, hidden_states)
        return cast(Tensor, residual + self.post_feedforward_layernorm(self.mlp(normalized)))


def _attended(layer: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    defaults = {"attention_mask": None, "position_ids": None, "position_embeddings": None}
    output, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **{**defaults, **kwargs})
    return cast(Tensor, output)


def _block_norm(norm: nn.Module, x: Tensor) -> BlockNorm | None:
    """Return the norm's arguments for a node that also computes what follows it, or None if it has to be called."""
    if not isinstance(norm, FusedRMSNorm) or has_hooks(norm) or not served(x, norm.weight):
        return None
    return BlockNorm(norm.weight, getattr(norm, norm.eps_name), norm.weight_offset)


def _added_and_normalized(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return (norm(residual + x), residual + x), in one op if the norm is fused and has no hooks."""
    if (
        isinstance(norm, FusedRMSNorm)
        and not has_hooks(norm)
        and served(x, residual, norm.weight)
        and x.dtype == residual.dtype
        and x.shape == residual.shape
    ):
        return norm.normalized(x, residual)
    total = residual + x
    return norm(total), total
