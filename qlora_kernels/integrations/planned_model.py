"""Shapes of models without their weights, by folder, GGUF file, hub id, or a common size such as 7B."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..nn.match import Pattern
from .hub import hub_folder, is_hub_id
from .model_folders import resolve_model
from .model_structure import LOCAL, ModelStructure, as_model_error

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
_SIZES = {
    "1B": (2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2
    "3B": (3072, 8192, 28, 24, 8, 128256, True),  # Llama 3.2
    "7B": (4096, 11008, 32, 32, 32, 32000, False),  # Llama 2
    "8B": (4096, 14336, 32, 32, 8, 128256, False),  # Llama 3.1
    "13B": (5120, 13824, 40, 40, 40, 32000, False),  # Llama 2
    "14B": (5120, 13824, 48, 40, 8, 152064, False),  # Qwen2.5, without its biases
    "32B": (5120, 27648, 64, 40, 8, 152064, False),  # Qwen2.5, without its biases
    "70B": (8192, 28672, 80, 64, 8, 128256, False),  # Llama 3.1
}
USUAL_SIZES = tuple(_SIZES)


class PlannedModel(NamedTuple):
    """The shapes of a model, and which of its layers are quantized and adapted.

    model: on the meta device.   quantized: names of the layers in NF4.   adapted: names of the layers with an update.
    """

    model: nn.Module
    quantized: list[str]
    adapted: list[str]


def planned_model(name: str, skip: Pattern = ("lm_head",)) -> PlannedModel:
    """Return the shapes of a model without reading or downloading its weights.

    name: a folder, a .gguf file, an id on the hub (only config.json is needed), or one of USUAL_SIZES.
    skip: linear layers that stay dense. All linear layers but the output head get an update.
    Raises ModelError if there is no such model.
    """
    with _config_folder(name) as folder:
        structure = ModelStructure(folder)
        return PlannedModel(structure.model, structure.linear_layers(skip), structure.linear_layers(("lm_head",)))


@contextmanager
def _config_folder(name: str) -> Iterator[Path]:
    """Return a folder with the model's config.json."""
    if name.upper() in _SIZES and not Path(name).exists():
        from transformers import LlamaConfig

        hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = _SIZES[name.upper()]
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            architectures=["LlamaForCausalLM"],
        )
    elif not Path(name).exists() and is_hub_id(name) and name != "builtin":
        yield hub_folder(name, weights=False)
        return
    else:
        source = resolve_model(name)
        if source.is_dir():
            yield source
            return
        from transformers import AutoConfig

        with as_model_error(source, "must be a whole GGUF file"):
            config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name, **LOCAL)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        yield Path(folder)
