"""LoRA+: a higher learning rate for B than for A.

Source: LoRA+ (arXiv:2402.12354): B starts at zero, and equal rates learn too slowly in wide layers; the paper
recommends a ratio near 16.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float, *, weight_decay: float = 0.0, embedding_lr: float = 1e-6
) -> list[dict[str, Any]]:
    """Return parameter groups: `lora_B` at lr * ratio, LoRA factors of embeddings at embedding_lr, all other trained
    parameters at lr. One-dimensional parameters have no weight decay.

    Raises ValueError if the model trains no lora_B.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    found = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = lr
            if ".lora_embedding_" in name:
                rate = embedding_lr
            elif ".lora_B" in name:
                rate, found = lr * ratio, True
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    if not found:
        raise ValueError("lora_plus_groups: model must train a lora_B; add a LoRA adapter first")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
