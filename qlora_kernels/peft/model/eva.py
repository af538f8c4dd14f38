"""EVA: initializes A of each LoRA layer with the principal directions of the layer's inputs.

Source: Explained Variance Adaptation (arXiv:2410.07170). The paper's redistribution of ranks over layers is not
implemented.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.lora import Lora
from ..methods.lora_layers import LoraLinear
from .peft_model import PeftModel


@torch.no_grad()
def initialize_eva(model: PeftModel, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> None:
    """Set lora_A of each layer to the first r right singular vectors of the inputs that the layer gets.

    batches: keyword arguments of the model's forward, with at least a few hundred tokens in total. Tokens with
    attention_mask 0 are left out. The base model runs over the batches without adapters, in eval mode.
    Raises ValueError if the adapter is not a single LoRA with init_lora_weights="eva", or if a layer got fewer input
    rows than its rank.
    """
    methods = model.injector.adapters.get(adapter_name, [])
    if len(methods) != 1 or not isinstance(methods[0], Lora) or methods[0].config.init_lora_weights != "eva":
        raise ValueError(f"initialize_eva: adapter {adapter_name!r} must be a LoRA of init_lora_weights='eva'")
    lora = methods[0]
    found: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]

    def observe(path: str, rank: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        if mask[0] is not None and mask[0].shape == x.shape[:-1]:
            x = x[mask[0].bool()]
        rows = x.reshape(-1, x.shape[-1]).float()
        seen = torch.cat([found[path], rows]) if path in found else rows
        # The singular vectors scaled by the singular values represent all previous rows.
        _, s, vh = torch.linalg.svd(seen, full_matrices=False)
        found[path] = (s[:, None] * vh)[:rank]

    hooks = [
        model.injector.hooked_module(path).register_forward_pre_hook(
            partial(observe, path, lora.rank(lora.config, path))
        )
        for path in lora.deltas
    ]
    training = model.training
    try:
        model.eval()
        with model.disable_adapter():
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                model(**batch)
    finally:
        model.train(mode=training)
        for hook in hooks:
            hook.remove()
    for path, delta in lora.deltas.items():
        scaled = found.get(path, torch.empty(0))
        r = lora.rank(lora.config, path)
        if len(scaled) < r or not scaled.norm(dim=1).all():
            raise ValueError(
                f"initialize_eva: {path} must get inputs of rank {r} or more, got {len(scaled)}; give more batches"
            )
        assert isinstance(delta, LoraLinear)
        delta.lora_A.weight.copy_(scaled / scaled.norm(dim=1, keepdim=True))
    lora.needs_eva = False
