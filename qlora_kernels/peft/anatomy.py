"""Anatomy: where the parts of a transformer are, by module names, for methods that act at attention or the FFN.

One entry of `_PLANS` describes a family by the names its layers use. A model of another family needs an entry, not
code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Layer:
    """One transformer layer. Every field but the first three is a path of a module in the model.

    self_attention, cross_attention: modules that compute softmax(Q K^T) V.
    attention_output, ffn_output: modules whose output is added to the residual stream next.
    ffn_input: the module whose first argument is the input x of the FFN.   ffn_second: its second linear layer.
    query: the projection with the query bias.   norms: normalisation layers.
    """

    index: int
    stack: str  # "encoder" (tokens see each other) or "decoder" (tokens see the past)
    path: str
    self_attention: str
    query: str
    attention_output: str
    ffn_input: str
    ffn_second: str
    ffn_output: str
    norms: tuple[str, ...]
    cross_attention: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """The layers in order, and the paths of the modules that turn position numbers into vectors."""

    layers: tuple[Layer, ...]
    positions: tuple[str, ...]

    @property
    def causal(self) -> bool:
        """Whether all that the model reads passes through decoder layers only."""
        return all(layer.stack == "decoder" for layer in self.layers)

    @property
    def seq2seq(self) -> bool:
        return len({layer.stack for layer in self.layers}) == 2


@dataclass(frozen=True)
class _Plan:
    """Names below a layer; `marks` tells the family: one of its layers has all of them."""

    layer: str  # pattern of a layer's path; its last number is the index
    stack: str | None  # None: the path says it
    self_attention: str
    query: str
    attention_output: str
    ffn_input: str
    ffn_second: str
    ffn_output: str
    norms: tuple[str, ...]
    cross_attention: str | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        cross = (self.cross_attention,) if self.cross_attention else ()
        ffn = (self.ffn_input, self.ffn_second, self.ffn_output)
        return (self.self_attention, self.query, self.attention_output, *ffn, *self.norms, *cross)


_TORCH_ENCODER = _Plan(
    layer=r"(?:.*\.)?layers\.(\d+)",
    stack="encoder",
    self_attention="self_attn",
    query="self_attn.q_proj",
    attention_output="dropout1",
    ffn_input="linear1",
    ffn_second="linear2",
    ffn_output="dropout2",
    norms=("norm1", "norm2"),
)
_T5 = _Plan(
    layer=r"(?:.*\.)?(encoder|decoder)\.block\.(\d+)",
    stack=None,
    self_attention="layer.0.SelfAttention",
    query="layer.0.SelfAttention.q",
    attention_output="layer.0.dropout",
    ffn_input="layer.1.DenseReluDense",
    ffn_second="layer.1.DenseReluDense.wo",
    ffn_output="layer.1.dropout",
    norms=("layer.0.layer_norm", "layer.1.layer_norm"),
)
_PLANS = (
    _Plan(  # Llama, Mistral, Qwen, Gemma, SmolLM
        layer=r"(?:.*\.)?layers\.(\d+)",
        stack="decoder",
        self_attention="self_attn",
        query="self_attn.q_proj",
        attention_output="self_attn.o_proj",
        ffn_input="mlp",
        ffn_second="mlp.down_proj",
        ffn_output="mlp",
        norms=("input_layernorm", "post_attention_layernorm"),
    ),
    _Plan(  # BERT, RoBERTa, Electra
        layer=r"(?:.*\.)?layer\.(\d+)",
        stack="encoder",
        self_attention="attention.self",
        query="attention.self.query",
        attention_output="attention.output.dropout",
        ffn_input="intermediate",
        ffn_second="output.dense",
        ffn_output="output.dropout",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
    ),
    _Plan(  # GPT-2
        layer=r"(?:.*\.)?h\.(\d+)",
        stack="decoder",
        self_attention="attn",
        query="attn.c_attn",
        attention_output="attn.resid_dropout",
        ffn_input="mlp",
        ffn_second="mlp.c_proj",
        ffn_output="mlp",
        norms=("ln_1", "ln_2"),
    ),
    replace(
        _T5,
        cross_attention="layer.1.EncDecAttention",
        ffn_input="layer.2.DenseReluDense",
        ffn_second="layer.2.DenseReluDense.wo",
        ffn_output="layer.2.dropout",
        norms=("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
    ),
    _T5,
    replace(
        _TORCH_ENCODER,
        stack="decoder",
        cross_attention="multihead_attn",
        ffn_output="dropout3",
        norms=("norm1", "norm2", "norm3"),
    ),
    _TORCH_ENCODER,
)


def anatomy(modules: Mapping[str, nn.Module]) -> Anatomy:
    """The parts of the model with these modules (Host.modules()).

    Raises NotImplementedError, with the families known, for a model that fits none of them.
    """
    layers = [layer for path in modules if (layer := _layer(path, modules))]
    if not layers:
        raise NotImplementedError(
            "anatomy: the model must have layers as Llama, BERT, GPT-2, T5 or torch.nn.Transformer do; "
            "methods that act on linear layers by name (LoRA, AdaLoRA) and BitFit need none"
        )
    return Anatomy(tuple(layers), tuple(path for path, module in modules.items() if _takes_positions(path, module)))


def _takes_positions(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    return name in ("wpe", "position_embeddings") or type(module).__name__.endswith("RotaryEmbedding")


def _layer(path: str, modules: Mapping[str, nn.Module]) -> Layer | None:
    for plan in _PLANS:
        found = re.fullmatch(plan.layer, path)
        if found and all(f"{path}.{name}" in modules for name in plan.marks):
            return Layer(
                index=int(found.groups()[-1]),
                stack=plan.stack or found[1],
                path=path,
                self_attention=f"{path}.{plan.self_attention}",
                query=f"{path}.{plan.query}",
                attention_output=f"{path}.{plan.attention_output}",
                ffn_input=f"{path}.{plan.ffn_input}",
                ffn_second=f"{path}.{plan.ffn_second}",
                ffn_output=f"{path}.{plan.ffn_output}",
                norms=tuple(f"{path}.{norm}" for norm in plan.norms),
                cross_attention=f"{path}.{plan.cross_attention}" if plan.cross_attention else None,
            )
    return None
