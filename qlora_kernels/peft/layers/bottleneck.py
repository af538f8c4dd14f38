"""Bottleneck: a small network that adapter methods add in parallel to a sublayer or after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
}


class Bottleneck(nn.Module):
    """The network f(x) = scale * up(activation(down(dropout(x)))).

    x [..., d];  down.weight [bottleneck_size, d];  up.weight [d, bottleneck_size]; both with bias.
    init: a number = both weights from a normal of that std, cut at two std (Houlsby); "lora" = Kaiming for down, zero
    for up (MAM). Biases start at zero. Computed in the weights' dtype, returned in x's.
    """

    def __init__(
        self,
        d: int,
        bottleneck_size: int,
        *,
        non_linearity: str,
        init: float | Literal["lora"],
        scale: float = 1.0,
        dropout: float = 0.0,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(d, bottleneck_size, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck_size, d, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[non_linearity]
        self.scale, self.dropout_p = scale, dropout
        for linear in (self.down, self.up):
            nn.init.zeros_(linear.bias)
            if init != "lora":
                nn.init.trunc_normal_(linear.weight, std=init, a=-2 * init, b=2 * init)
        if init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(x.to(self.down.weight.dtype), self.dropout_p, self.training)
        y: Tensor = self.up(self.activation(self.down(inner))) * self.scale
        return y.to(x.dtype)
