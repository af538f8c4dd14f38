"""Attention modules of transformers' models whose rotary embedding and attention run on this package's ops."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..ops.attention import Keys
from ..ops.lora_attention import LoRAAttention, lora_attention
from ..ops.residual_block import BlockNorm
from ..ops.rope import rope
from .fused_module import FusedModule, served
from .fused_sdpa import fused_sdpa, self_attention_ranges
from .known_forms import form_of, unwrapped_function
from .plain_projection import plain_projections


class AttentionForm(NamedTuple):
    """The properties in which the forwards of the families differ.

    norms_heads: whether q and k pass through q_norm and k_norm.   optional_rope: whether self.use_rope may disable the
    rotary embedding of a layer.   arguments: name of an argument of the attention function -> attribute of the module
    or its config.
    """

    norms_heads: bool = False
    optional_rope: bool = False
    arguments: tuple[tuple[str, str], ...] = ()


_WINDOW = ("sliding_window", "sliding_window")
FORMS = {
    "39b01bc94df3439f": AttentionForm(),  # Llama, Gemma
    "8050a52a03273d1f": AttentionForm(arguments=(_WINDOW,)),  # Qwen2
    "e99a993e2393c995": AttentionForm(norms_heads=True, arguments=(_WINDOW,)),  # Qwen3
    "34c2337325b8fc08": AttentionForm(arguments=(("sliding_window", "config.sliding_window"),)),  # Mistral
    "a05f904023817eda": AttentionForm(arguments=(_WINDOW, ("softcap", "attn_logit_softcapping"))),  # Gemma 2
    "9d3b2011c0a2173c": AttentionForm(norms_heads=True, arguments=(_WINDOW,)),  # Gemma 3
    "7ce3277600428f78": AttentionForm(optional_rope=True, arguments=(_WINDOW,)),  # SmolLM3
}
"""Digest of a forward (`form_of`) -> its properties, for transformers 5.24."""

_GLOBALS = {"apply_rotary_pos_emb": "e09c64c381670d00", "rotate_half": "34ac59980bfd6c26"}
"""Global functions that a known forward calls -> digests of their code."""


def attention_form(kind: type[nn.Module]) -> AttentionForm | None:
    """Return the properties of an attention class, or None if its code is not known."""
    forward: Any = kind.forward
    form = FORMS.get(form_of(forward) or "")
    names = unwrapped_function(forward).__globals__ if form is not None else {}
    known = all(inspect.isfunction(names.get(name)) and form_of(names[name]) == own for name, own in _GLOBALS.items())
    return form if known else None


class FusedAttention(FusedModule):
    """Attention with the projections of the model and its rotary embedding and attention on ops, where enabled."""

    rotates: ClassVar[bool] = True
    """Whether the rotary embedding runs on its op."""
    attends: ClassVar[bool] = True
    """Whether attention runs on its op, where the op supports the call, instead of the model's attention function."""
    form: ClassVar[AttentionForm]
    attention_functions: ClassVar[Any]
    """transformers' registry of attention functions."""
    eager_attention: ClassVar[Any]
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float
    config: Any

    @classmethod
    def members_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        form = attention_form(base)
        assert form is not None
        names = unwrapped_function(cast(Any, base.forward)).__globals__
        eager = staticmethod(names["eager_attention_forward"])
        return {"form": form, "attention_functions": names["ALL_ATTENTION_FUNCTIONS"], "eager_attention": eager}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        rotates = getattr(self, "use_rope", True) if self.form.optional_rope else True
        if position_embeddings is None or not rotates or "past_key_values" in kwargs:
            if cache is not None:
                kwargs["cache"] = cache
            return cast(
                "tuple[Tensor, Tensor | None]",
                super().forward(hidden_states, position_embeddings, attention_mask, **kwargs),
            )
        if cache is None:
            output = self.as_one_node(hidden_states, None, position_embeddings, attention_mask, **kwargs)
            if output is not None:
                return output, None
        leading = hidden_states.shape[:-1]
        heads = (*leading, -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if self.form.norms_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        rotate = _rotated if self.rotates else _rotated_plainly
        query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attended, weights = self._attend(
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self._arguments(),
            **kwargs,
        )
        return self.o_proj(attended.reshape(*leading, -1).contiguous()), weights

    def as_one_node(
        self,
        hidden_states: Tensor,
        norm: BlockNorm | None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Run projections, rotation and attention as one autograd node, or return None if this is not supported.

        norm: of the input, to which the output is added; None for neither.
        """
        rotates = self.rotates and (getattr(self, "use_rope", True) if self.form.optional_rope else True)
        if (
            not (rotates and self.attends)
            or self.form.norms_heads
            or position_embeddings is None
            or cache is not None
            or "past_key_values" in kwargs
            or self.config._attn_implementation != "sdpa"
            or hidden_states.dim() != 3
            or not served(hidden_states, *position_embeddings)
        ):
            return None
        cos, sin = position_embeddings
        dropout = self.attention_dropout if self.training else 0.0
        arguments = {**self._arguments(), **kwargs}
        projections = plain_projections(hidden_states, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        if projections is None:
            return None
        ranges = self_attention_ranges(self, hidden_states, attention_mask, cos, dropout=dropout, **arguments)
        if ranges is None:
            return None
        scale = self.head_dim**-0.5 if self.scaling is None else float(self.scaling)
        keys = Keys(*ranges, scale, 0.0)
        q, k, v, o = projections
        return lora_attention(hidden_states, LoRAAttention(q, k, v, o, self.head_dim, cos, sin, keys, norm))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run the op where it supports the arguments, otherwise the model's own attention function."""
        implementation = self.config._attn_implementation
        if self.attends and implementation == "sdpa":
            attended = fused_sdpa(self, query, key, value, mask, **arguments)
            if attended is not None:
                return attended, None
        attend = self.attention_functions.get_interface(implementation, self.eager_attention)
        return cast("tuple[Tensor, Tensor | None]", attend(self, query, key, value, mask, **arguments))

    def _arguments(self) -> dict[str, Any]:
        values = {}
        for name, place in self.form.arguments:
            holder, _, attribute = place.rpartition(".")
            values[name] = getattr(self.config, attribute, None) if holder else getattr(self, attribute)
        return values


class FusedRotation(FusedAttention):
    """FusedAttention with the rotary embedding on its op and the model's own attention function."""

    attends = False


class FusedAttentionAlone(FusedAttention):
    """FusedAttention with attention on its op and the model's own rotary embedding."""

    rotates = False


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the op, or by the formula of transformers where the op does not support them."""
    dtype = query.dtype
    if (
        served(query, key, cos, sin)
        and key.dtype == dtype
        and cos.dtype == dtype
        and sin.dtype == dtype
        and cos.dim() == 3
        and cos.shape[-1] == query.shape[-1]
        and not (cos.requires_grad or sin.requires_grad)
    ):
        return rope(query, key, cos, sin)
    return _rotated_plainly(query, key, cos, sin)


def _rotated_plainly(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotated_one(query, cos, sin), _rotated_one(key, cos, sin)


def _rotated_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
