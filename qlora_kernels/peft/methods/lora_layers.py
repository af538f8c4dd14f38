"""LoRA's updates of a linear layer: a low-rank product, and DoRA with a trained magnitude."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.module_tree import has_hooks
from ..core.offloaded import weight_of
from ..layers.base_layer import dense_weight, device_of, features
from ..layers.delta import Delta
from ..layers.lowrank import forward_lowrank
from .lora_config import LoraConfig


class LoraLinear(Delta):
    """Update scaling * B A with the parameters lora_A.weight [r, K] and lora_B.weight [N, r].

    `fixed_A` [r, K] and `fixed_B` [N, r], if present, are a second, untrained pair: the part that PiSSA and OLoRA
    subtract from W.
    """

    lora_A: Any
    lora_B: Any
    fixed_A: Tensor | None
    fixed_B: Tensor | None

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.lora_A, self.lora_B = self._new_layers(base, r, config, device_of(base), dtype)
        self.r, self.scaling, self.dropout_p = r, scaling, config.lora_dropout
        self.register_buffer("fixed_A", None)
        self.register_buffer("fixed_B", None)
        self._init(config.init_lora_weights)

    def _new_layers(
        self, base: nn.Module, r: int, config: LoraConfig, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Any]:
        """Return the layers that hold A and B, randomly initialized."""
        k, n = features(base)
        lora_A = nn.Linear(k, r, bias=False, device=device, dtype=dtype)
        return lora_A, nn.Linear(r, n, bias=config.lora_bias, device=device, dtype=dtype)

    def _init(self, how: bool | str) -> None:
        if how is False or how == "orthogonal":
            return  # nn.Linear's initialization, Kaiming uniform for both; init_orthogonal replaces it
        if how == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        nn.init.zeros_(self.lora_B.weight)
        if self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy lora_A [r, K] and lora_B [N, r] into the parameters."""
        self.lora_A.weight.data.copy_(lora_A)
        self.lora_B.weight.data.copy_(lora_B)

    def offset(self) -> Tensor | None:
        return None if self.lora_B.bias is None else self.scaling * weight_of(self.lora_B, "bias")

    def lowrank(self) -> tuple[Tensor, Tensor, float]:
        lora_A, lora_B = self.lora_A.weight, self.lora_B.weight
        if lora_A.is_meta or lora_B.is_meta:
            lora_A, lora_B = weight_of(self.lora_A, "weight"), weight_of(self.lora_B, "weight")
        fixed_A, fixed_B = self._buffers["fixed_A"], self._buffers["fixed_B"]
        if fixed_A is not None and fixed_B is not None:
            lora_A, lora_B = torch.cat([lora_A, fixed_A]), torch.cat([lora_B, fixed_B], dim=1)
        return lora_A, lora_B, self.scaling

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        # Hooks run only when layers are called, and FSDP wraps layers, so the layers are called in these cases.
        lora_A, lora_B = self.lora_A, self.lora_B
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or has_hooks(self, lora_A, lora_B):
            return None
        return self.lowrank()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        dropped = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout_p, self.training)
        update = self.lora_B(self.lora_A(dropped))
        if self.fixed_A is not None and self.fixed_B is not None:
            update = update + F.linear(F.linear(dropped, self.fixed_A), self.fixed_B)
        updated: Tensor = y + self.scaling * update
        return updated.to(y.dtype)


class Dora(Delta):
    """W' = m * V / |V|_row, V = W + scaling * B A; m = lora_magnitude_vector [N] starts as |W|_row: identity.

    A mixin in front of a class with lowrank(). |V|_row is a constant for the gradient (DoRA section 4.3). A row of V
    that is zero has no direction; it is not scaled until B changes it. With dropout, PEFT also drops x in the W part of
    the update; here W x is the layer's output, which is computed once.
    """

    lora_magnitude_vector: Tensor

    def factors(self) -> None:
        return None

    def row_scale(self, base: nn.Module) -> Tensor:
        """Return m / |V|_row, [N], for the base layer's weight."""
        lora_A, lora_B, scaling = self.lowrank()
        norm = row_norms(dense_weight(base), lora_A.detach().float(), lora_B.detach().float(), scaling)
        magnitude = weight_of(self, "lora_magnitude_vector").flatten()
        norm = norm.to(magnitude.dtype)
        zero = norm == 0
        scale: Tensor = magnitude / norm.masked_fill(zero, 1.0)
        return scale.masked_fill(zero, 1.0)

    def merged(self, weight: Tensor, base: nn.Module) -> Tensor:
        return self.row_scale(base).detach().float()[:, None] * super().merged(weight, base)

    def updated(self, weight: Tensor, base: nn.Module) -> Tensor:
        return (self.row_scale(base)[:, None] * super().updated(weight, base)).to(weight.dtype)


class DoraLinear(Dora, LoraLinear):
    """DoRA of a linear layer; lora_magnitude_vector [N]."""

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__(base, r, scaling, config, dtype)
        self.lora_magnitude_vector = nn.Parameter(dense_weight(base).norm(dim=1).to(dtype))

    def first_output(self, x: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor | None:
        plain = LoraLinear.factors(self)
        if plain is None:
            return None
        # V x is the output of plain LoRA, which one fused call computes. Its rows are scaled, the bias is not.
        y = forward_lowrank(base, x, [plain], dropout_p=self.dropout_p if self.training else 0.0)
        scale = self.row_scale(base)
        scaled = y * scale if bias is None else torch.addcmul(bias - scale * bias, y, scale)
        return scaled.to(y.dtype)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        lora_A, lora_B, scaling = self.lowrank()
        scale = self.row_scale(base)
        dropped = F.dropout(x.to(lora_A.dtype), self.dropout_p, self.training)
        update = F.linear(F.linear(dropped, lora_A), lora_B) * scaling
        without_bias = y if bias is None else y - bias
        return (y + (scale - 1) * without_bias + scale * update).to(y.dtype)


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return the norms [N] of the rows of W + scaling * B A without computing the product B A [N, K].

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for a row w of W and b of B. Where B is zero, the result is
    bit-equal to the norm of w, because the square root of a rounded square is the number itself.

    weight: fp32 W [N, K].   lora_A: fp32 [r, K].   lora_B: fp32 [N, r].
    """
    cross = ((weight @ lora_A.T) * lora_B).sum(dim=1)
    update = ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(dim=1)
    square: Tensor = weight.norm(dim=1).square() + 2 * scaling * cross + scaling**2 * update
    return square.clamp_min(0.0).sqrt()
