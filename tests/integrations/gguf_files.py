"""Small random models of the architectures that GGUF export knows, and the contents of GGUF files."""

from __future__ import annotations

import gguf
import numpy as np
import torch
import transformers

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}

IDS = torch.arange(5, 25).view(1, 20)

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_model(kind: str, tokenizer, **changes):
    config = getattr(transformers, f"{CLASSES[kind]}Config")(vocab_size=len(tokenizer), **{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # also biases and norms, which begin as 0 and 1
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.eval()


def tensors(path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def fields(path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def read_by_transformers(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()
