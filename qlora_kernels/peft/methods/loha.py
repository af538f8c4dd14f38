"""LoHa: W' = W + (alpha / r) (A1 B1) * (A2 B2), the elementwise product of two matrices of rank r.

Source: FedPara (arXiv:2108.06098), LyCORIS (arXiv:2309.14859). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...nn.module_tree import has_hooks
from ..core.offloaded import weight_of
from ..framework.registry import register_method
from ..layers.base_layer import device_of, features
from ..layers.lowrank import LoraFactors
from .lycoris import LycorisConfig, LycorisDelta, LycorisMethod


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa, with the fields, names and defaults of PEFT's LoHaConfig.

    rank_dropout: probability with which an output feature of the update is zeroed in a training step; the others are
    scaled up.
    module_dropout: probability with which a layer's whole update is left out of a training step.
    init_weights: True (the fourth factor zero: identity) or False (all four Kaiming uniform).
    use_effective_conv2d: accepted for PEFT's files; it has no effect on linear layers.
    """

    peft_type = "LOHA"

    init_weights: bool = True


class LoHaLinear(LycorisDelta):
    """Update (w1_a w1_b) * (w2_a w2_b) with parameters hada_w1_a, hada_w2_a [N, r] and hada_w1_b, hada_w2_b [r, K]."""

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoHaConfig, dtype: torch.dtype) -> None:
        super().__init__(scaling, config)
        k, n = features(base)
        device = device_of(base)
        self.rank_dropout_scale = True
        for number in (1, 2):
            for side, shape in (("a", (n, r)), ("b", (r, k))):
                factor = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
                self.register_parameter(f"hada_w{number}_{side}", factor)
        if config.init_weights:
            nn.init.zeros_(self.get_parameter("hada_w2_b"))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a1, b1, a2, b2 = (weight_of(self, f"hada_w{number}_{side}") for number in (1, 2) for side in "ab")
        return a1, b1, a2, b2

    @property
    def dtype(self) -> torch.dtype:
        return weight_of(self, "hada_w1_a").dtype

    def update(self) -> Tensor:
        a1, b1, a2, b2 = self._factors()
        return self.scaling * ((a1 @ b1) * (a2 @ b2))

    def lowrank(self) -> LoraFactors:
        """Return the update as factors of rank r * r: the products of all pairs of columns and of all pairs of rows."""
        a1, b1, a2, b2 = self._factors()
        lora_B = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        lora_A = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
        return lora_A, lora_B, self.scaling

    def factors(self) -> LoraFactors | None:
        a1, b1, _, _ = self._factors()
        (n, r), k = a1.shape, b1.shape[1]
        # For larger ranks the dense update is smaller and cheaper to multiply by.
        if r * r * (n + k) > n * k or self.drops or has_hooks(self):
            return None
        return self.lowrank()

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.update())


@register_method(LoHaConfig)
class LoHa(LycorisMethod[LoHaLinear]):
    """LoHa updates of the targeted linear layers."""

    config: LoHaConfig
    rank_tensors: ClassVar[dict[str, int]] = {"hada_w1_b": 0}

    def new_delta(self, path: str, base: nn.Module) -> LoHaLinear:
        r, scaling = self.size(path)
        return LoHaLinear(base, r, scaling, self.config, self.injector.adapter_dtype)
