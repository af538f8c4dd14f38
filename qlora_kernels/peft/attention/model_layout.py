"""ModelLayout: the module names of a transformer's parts, for methods that act on attention or the FFN.

Each entry of `_PATTERNS` describes the layers of one model family by their module names. A new family needs a new entry
and no code.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """Paths of the modules of one layer.

    self_attention, cross_attention: modules that compute softmax(Q K^T) V.   query: the projection with the query bias.
    attention_output, ffn_output: modules whose output is added to the residual stream next.
    ffn_input: the module whose first argument is the residual stream that the FFN, or its LayerNorm, reads.
    ffn_first: the FFN's first linear layer; two where one of them is a gate.
    stream: the module that returns the residual stream after the FFN's output was added: the LayerNorm of the sum, or,
    if layers normalise their input, the block that computes the sum.
    norms: normalisation layers.
    """

    self_attention: str
    query: str
    attention_output: str
    ffn_input: str
    ffn_first: tuple[str, ...]
    ffn_output: str
    stream: str
    norms: tuple[str, ...]
    cross_attention: str | None = None

    @property
    def post_norm(self) -> bool:
        """Whether `stream` is a LayerNorm, so that its input is the sum; otherwise its output is the sum."""
        return self.stream in self.norms


@dataclass(frozen=True, kw_only=True)
class TransformerLayer(LayerParts):
    """One transformer layer: its number, its own path, and its parts by their paths in the model."""

    index: int
    stack: str  # "encoder" (tokens attend to all tokens) or "decoder" (tokens attend to earlier ones)
    path: str


@dataclass(frozen=True)
class ModelLayout:
    """The layers in order, and the paths of the modules that turn position numbers into vectors."""

    layers: tuple[TransformerLayer, ...]
    positions: tuple[str, ...]

    @property
    def causal(self) -> bool:
        """Whether the model has only decoder layers."""
        return all(layer.stack == "decoder" for layer in self.layers)

    @property
    def seq2seq(self) -> bool:
        """Whether the model has both encoder and decoder layers."""
        return len({layer.stack for layer in self.layers}) == 2


@dataclass(frozen=True)
class _LayerPattern:
    """A family of layers.

    layer: pattern of a layer's path, whose last number is the index. parts: names of the parts below the layer, which
    is itself ""; they identify the family. Names in ffn_first that do not exist are ignored.
    """

    layer: str
    stack: str | None  # None: determined by the path
    parts: LayerParts

    def fits(self, path: str, modules: Mapping[str, nn.Module]) -> re.Match[str] | None:
        parts = self.parts
        names = (parts.self_attention, parts.query, parts.attention_output, parts.ffn_input, parts.ffn_output)
        marks = (*names, *parts.norms, *filter(None, [parts.cross_attention]))
        found = re.fullmatch(self.layer, path)
        there = all(_below(path, name) in modules for name in marks)
        return found if there and any(_below(path, name) in modules for name in parts.ffn_first) else None


_LLAMA = LayerParts(
    self_attention="self_attn",
    query="self_attn.q_proj",
    attention_output="self_attn.o_proj",
    ffn_input="post_attention_layernorm",
    ffn_first=("mlp.gate_proj", "mlp.up_proj"),
    ffn_output="mlp",
    stream="",
    norms=("input_layernorm", "post_attention_layernorm"),
)
_GEMMA = dataclasses.replace(  # also has a LayerNorm after each sublayer
    _LLAMA,
    attention_output="post_attention_layernorm",
    ffn_input="pre_feedforward_layernorm",
    ffn_output="post_feedforward_layernorm",
    norms=(*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_BERT = LayerParts(
    self_attention="attention.self",
    query="attention.self.query",
    attention_output="attention.output.dropout",
    ffn_input="intermediate",
    ffn_first=("intermediate.dense",),
    ffn_output="output.dropout",
    stream="output.LayerNorm",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)
_GPT2 = LayerParts(
    self_attention="attn",
    query="attn.c_attn",
    attention_output="attn.resid_dropout",
    ffn_input="ln_2",
    ffn_first=("mlp.c_fc",),
    ffn_output="mlp",
    stream="",
    norms=("ln_1", "ln_2"),
)


def _t5(ffn: str, cross_attention: str | None = None) -> LayerParts:
    """Return the parts of a T5 block with its FFN at `ffn`, after one or two attentions."""
    dense = f"{ffn}.DenseReluDense"
    before = ("layer.0",) if cross_attention is None else ("layer.0", "layer.1")
    return LayerParts(
        self_attention="layer.0.SelfAttention",
        query="layer.0.SelfAttention.q",
        attention_output="layer.0.dropout",
        ffn_input=f"{ffn}.layer_norm",
        ffn_first=(f"{dense}.wi", f"{dense}.wi_0", f"{dense}.wi_1"),
        ffn_output=f"{ffn}.dropout",
        stream=ffn,
        norms=tuple(f"{sublayer}.layer_norm" for sublayer in (*before, ffn)),
        cross_attention=cross_attention,
    )


def _torch(norms: int, cross_attention: str | None = None) -> LayerParts:
    """Return the parts of torch's layer with that many LayerNorms and as many dropouts."""
    return LayerParts(
        self_attention="self_attn",
        query="self_attn.q_proj",
        attention_output="dropout1",
        ffn_input="linear1",
        ffn_first=("linear1",),
        ffn_output=f"dropout{norms}",
        stream=f"norm{norms}",
        norms=tuple(f"norm{i}" for i in range(1, norms + 1)),
        cross_attention=cross_attention,
    )


_LAYERS, _BLOCKS = r"(?:.*\.)?layers\.(\d+)", r"(?:.*\.)?(encoder|decoder)\.block\.(\d+)"
_PATTERNS = (
    _LayerPattern(_LAYERS, "decoder", _GEMMA),  # Gemma 2 and 3
    _LayerPattern(_LAYERS, "decoder", _LLAMA),  # Llama, Mistral, Qwen, Gemma, SmolLM
    _LayerPattern(r"(?:.*\.)?layer\.(\d+)", "encoder", _BERT),  # BERT, RoBERTa, Electra
    _LayerPattern(r"(?:.*\.)?h\.(\d+)", "decoder", _GPT2),
    _LayerPattern(_BLOCKS, None, _t5("layer.2", cross_attention="layer.1.EncDecAttention")),
    _LayerPattern(_BLOCKS, None, _t5("layer.1")),
    _LayerPattern(_LAYERS, "decoder", _torch(3, cross_attention="multihead_attn")),
    _LayerPattern(_LAYERS, "encoder", _torch(2)),
)


def model_layout(modules: Mapping[str, nn.Module]) -> ModelLayout:
    """Return the parts of the model with these modules (Injector.modules()).

    Raises NotImplementedError, which lists the known families, for a model of no known family.
    """
    layers = [layer for path in modules if (layer := _layer(path, modules))]
    if not layers:
        raise NotImplementedError(
            "anatomy: the model must have layers as Llama, BERT, GPT-2, T5 or torch.nn.Transformer do; "
            "methods that act on linear layers by name (LoRA, AdaLoRA) and BitFit need none"
        )
    return ModelLayout(tuple(layers), tuple(path for path, module in modules.items() if _takes_positions(path, module)))


def _takes_positions(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    return name in ("wpe", "position_embeddings") or type(module).__name__.endswith("RotaryEmbedding")


def _layer(path: str, modules: Mapping[str, nn.Module]) -> TransformerLayer | None:
    for pattern in _PATTERNS:
        if found := pattern.fits(path, modules):
            parts = pattern.parts
            if getattr(modules[path], "norm_first", False):  # torch's layers can normalise before or after
                parts = dataclasses.replace(parts, stream="", ffn_input=parts.norms[-1])
            paths = {field.name: _below(path, getattr(parts, field.name)) for field in dataclasses.fields(parts)}
            paths["ffn_first"] = tuple(linear for linear in paths["ffn_first"] if linear in modules)
            return TransformerLayer(index=int(found.groups()[-1]), stack=pattern.stack or found[1], path=path, **paths)
    return None


def _below(path: str, name: str | tuple[str, ...] | None) -> Any:
    """Return the path of a name, or of each of several names, below `path`; "" is `path` itself."""
    if name is None:
        return None
    if isinstance(name, tuple):
        return tuple(_below(path, one) for one in name)
    return f"{path}.{name}" if name else path
