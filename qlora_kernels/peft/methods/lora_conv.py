"""LoRA of a convolution: A is a convolution to r channels, B a convolution of kernel size 1.

Names, shapes and files: PEFT's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.offloaded import weight_of
from ..layers.base_layer import convolution_class, dense_weight
from .lora_config import LoraConfig
from .lora_layers import Dora, LoraLinear


class LoraConv(LoraLinear):
    """Update scaling * B(A(x)): lora_A.weight [r, in_channels, *kernel_size], lora_B.weight [out_channels, r, 1, ...].

    A has the base's stride, padding and dilation. For a base with groups, A takes the channels of all groups and B has
    the groups; such an update is not one of the base's weight.
    Raises NotImplementedError for other values of init_lora_weights than a bool or "gaussian", and ValueError for a
    rank that the groups do not divide.
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoraConfig, dtype: torch.dtype) -> None:
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise NotImplementedError(
                "LoraConfig: init_lora_weights must be a bool or 'gaussian' for a convolution, got "
                f"{config.init_lora_weights!r}; leave convolutions out of target_modules"
            )
        self.groups = cast(nn.Conv2d, base).groups
        if r % self.groups:
            raise ValueError(f"LoraConfig: r must be divisible by the groups of a convolution, {self.groups}, got {r}")
        super().__init__(base, r, scaling, config, dtype)

    def _new_layers(
        self, base: nn.Module, r: int, config: LoraConfig, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Any]:
        conv, kind = cast(nn.Conv2d, base), convolution_class(base)
        lora_A = kind(
            conv.in_channels,
            r,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=False,
            padding_mode=conv.padding_mode,
            device=device,
            dtype=dtype,
        )
        bias = config.lora_bias
        return lora_A, kind(r, conv.out_channels, 1, groups=self.groups, bias=bias, device=device, dtype=dtype)

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy lora_A [r, K] and lora_B [N, r] into the parameters."""
        for layer, factor in ((self.lora_A, lora_A), (self.lora_B, lora_B)):
            layer.weight.data.copy_(factor.view(layer.weight.shape))

    def lowrank(self) -> tuple[Tensor, Tensor, float]:
        if self.groups > 1:
            raise NotImplementedError(
                f"LoRA: the update of a convolution must have groups=1 where it is used as a weight, got {self.groups}"
            )
        return weight_of(self.lora_A, "weight").flatten(1), weight_of(self.lora_B, "weight").flatten(1), self.scaling

    def factors(self) -> None:
        return None


class DoraConv(Dora, LoraConv):
    """DoRA of a convolution; lora_magnitude_vector [1, out_channels, 1, ...].

    Raises NotImplementedError for a convolution with groups.
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__(base, r, scaling, config, dtype)
        if self.groups > 1:
            raise NotImplementedError(
                f"LoraConfig: use_dora must be False for a convolution with groups, got groups={self.groups}"
            )
        norm = dense_weight(base).norm(dim=1).to(dtype)
        self.lora_magnitude_vector = nn.Parameter(norm.view(1, -1, *(1,) * (cast(Tensor, base.weight).dim() - 2)))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        along_channels = (-1, *(1,) * (cast(Tensor, base.weight).dim() - 2))
        scale = self.row_scale(base).view(along_channels)
        dropped = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout_p, self.training)
        update: Tensor = self.scaling * self.lora_B(self.lora_A(dropped))
        without_bias = y if bias is None else y - bias.view(along_channels)
        return (y + (scale - 1) * without_bias + scale * update).to(y.dtype)
