"""Tiny random decoders of the transformers families that fuse_model supports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.nn.fused_module import FusedModule

VOCAB = 48
FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3", "SmolLM3")


def tiny_decoder(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """Return a causal language model of two layers in eval mode, with random weights in its norms."""
    import transformers

    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config(**{**defaults, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Return token ids without the padding token 0."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model: nn.Module, ids: Tensor, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of a step; a fused model in training mode returns logits only on request."""
    model.zero_grad()
    fused = {"skip_logits": False} if isinstance(model, FusedModule) else {}
    output = model(ids, labels=ids, **inputs, **fused)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
