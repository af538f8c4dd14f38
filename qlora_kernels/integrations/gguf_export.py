"""GGUF files for llama.cpp and Ollama: whole models with their tokenizers, and LoRA adapters.

The supported architectures are Llama, Mistral, Qwen2 and Qwen3. Names of tensors come from the gguf package. Models
that llama.cpp would compute differently from transformers (unknown architectures, tokenizers or kinds of rotary
scaling) are refused.
Source of the format: github.com/ggml-org/ggml/blob/master/docs/gguf.md and the gguf package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .gguf_tokenizer import add_tokenizer
from .model_structure import ModelError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type of a configuration -> architecture of a GGUF file."""
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""outtype of write_model_gguf -> name of the type of the file."""
_LARGEST_FP16 = 65504.0
_ROWS = 32
"""Number of values in a block of q8_0; rows whose length is not a multiple of it are written as f16."""


class LoRAFactors(NamedTuple):
    """The low-rank update scaling * B A of a layer. A: [r, in_features]. B: [out_features, r]."""

    A: Tensor
    B: Tensor
    scaling: float


def write_model_gguf(path: Path, model: nn.Module, tokenizer: Any, outtype: str = "f16") -> None:
    """Write a dense model and its tokenizer as a GGUF file.

    model: a transformers model without quantized layers. outtype: type of matrices, one of FILE_TYPES; vectors are f32.
    Raises ModelError for a model or a tokenizer that the format cannot represent.
    """
    import gguf

    config = _config(model)
    writer, names = _writer(path, config)
    _check_function(config, model.state_dict())
    writer.add_name(Path(getattr(config, "_name_or_path", "") or "model").name or "model")
    writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[outtype]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, tensor in _tensors(model, config):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"export: every weight must have a name in GGUF, got {name}")
        _add(writer, target, _as_llama_cpp(name, tensor, config), outtype if tensor.dim() > 1 else "f32")
    if (factors := _rope_factors(config)) is not None:
        _add(writer, "rope_freqs.weight", factors, "f32")
    _write(writer)


def write_lora_gguf(path: Path, config: Any, factors: Mapping[str, LoRAFactors], alpha: float) -> None:
    """Write the low-rank updates of linear layers as a LoRA adapter of llama.cpp.

    config: the base model's configuration. factors: name of a layer in the base model -> its factors.
    alpha: llama.cpp multiplies B A by alpha / r; if a layer's scaling differs from it, B is multiplied by the ratio.
    Raises ModelError for layers without a name in GGUF.
    """
    config = config.get_text_config()
    writer, names = _writer(path, config)
    if config.tie_word_embeddings and "lm_head" in factors:
        raise ModelError(
            "export: an adapter of lm_head must be over a model whose head is not tied to the embedding, for which "
            "GGUF has one tensor; use --gguf"
        )
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for layer, (A, B, scaling) in factors.items():
        target = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if target is None:
            raise ModelError(f"export: every adapted layer must have a name in GGUF, got {layer}")
        B = B.float() * (scaling * len(A) / alpha)
        _add(writer, f"{target}.lora_a", A.float(), "f32")
        _add(writer, f"{target}.lora_b", _as_llama_cpp(f"{layer}.weight", B, config), "f32")
    _write(writer)


def _config(model: Any) -> Any:
    return model.config.get_text_config()


def _writer(path: Path, config: Any) -> tuple[Any, Any]:
    """Return (a writer of the file, the names of the architecture's tensors)."""
    import gguf

    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"export: the model must be one of {', '.join(ARCHITECTURES)}, got {config.model_type}; use "
            "convert_hf_to_gguf.py of llama.cpp on a folder of `export --merged`"
        )
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.GGUFWriter(path, architecture), gguf.get_tensor_name_map(kind, config.num_hidden_layers)


def context_length(config: Any) -> int:
    """Return the number of tokens up to which llama.cpp computes the same function as the model.

    llama.cpp lets these architectures attend to all tokens, which is the same as long as a sliding window holds them.
    config: of the text model.
    """
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    positions: int = config.max_position_embeddings
    return positions if window is None or "sliding_attention" not in layers else min(positions, window)


def _check_function(config: Any, names: Iterable[str]) -> None:
    """Raise ModelError where llama.cpp has another activation, or no place for a bias."""
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(f"export: hidden_act must be silu, got {config.hidden_act}; use --merged")
    endings: dict[str, tuple[str, ...]] = {
        "llama": (".bias",),
        "qwen2": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        "qwen3": (),
    }
    allowed = endings[ARCHITECTURES[config.model_type]]
    if without_place := [name for name in names if name.endswith(".bias") and not name.endswith(allowed)]:
        raise ModelError(
            f"export: {without_place[0]} must not exist, since llama.cpp's {config.model_type} has no such bias"
        )


def _add_sizes(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    if head_dim * heads != config.hidden_size or config.model_type == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise ModelError(f"export: rope_type must be default, linear or llama3, got {rope['rope_type']}")
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError(f"export: partial_rotary_factor must be 1, got {rope['partial_rotary_factor']}")
    return {"rope_type": "default", **rope}


def _rope_factors(config: Any) -> Tensor | None:
    """Return the divisors of the rotary frequencies under Llama 3's scaling, fp32 [head_dim / 2]; None without it."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        turns = original / (2 * math.pi * rope["rope_theta"] ** (i / head_dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _tensors(model: nn.Module, config: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if not (name.startswith("lm_head.") and config.tie_word_embeddings):
            yield name, tensor


def _as_llama_cpp(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Reorder the rows of q and k for architecture llama, in which rows that are rotated together are neighbours."""
    if ARCHITECTURES[config.model_type] != "llama":
        return tensor
    heads = config.num_attention_heads
    if ".k_proj." in name:
        heads = getattr(config, "num_key_value_heads", None) or heads
    elif ".q_proj." not in name:
        return tensor
    shape = tensor.shape
    return tensor.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)


def _add(writer: Any, name: str, tensor: Tensor, outtype: str) -> None:
    import gguf

    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if outtype == "q8_0" and values.shape[-1] % _ROWS:
        outtype = "f16"
    largest = float(abs(values).max(initial=0))
    if outtype == "f16" and not largest <= _LARGEST_FP16:  # also for NaN
        raise ModelError(f"export: {name} must be within the range of fp16, got {largest}; use --outtype bf16")
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
