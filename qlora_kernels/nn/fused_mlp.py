"""Gated MLPs of transformers' models, down_proj(act_fn(gate_proj(x)) * up_proj(x)), on the glu op."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..ops.glu import glu
from .fused_module import FusedModule, is_watched, served

_ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
}


def activation_of(act_fn: object) -> str | None:
    """Return the op's name of an activation module, or None if the op does not have it."""
    kind = type(act_fn)
    return _ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")


class FusedMLP(FusedModule):
    """A gated MLP on the glu op; its three projections stay modules, with their adapters."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        activation = activation_of(self.act_fn)
        if activation is None or is_watched(self.act_fn):
            return cast(Tensor, super().forward(x))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not served(gate, up) or gate.dtype != up.dtype or gate.shape != up.shape:
            return cast(Tensor, self.down_proj(self.act_fn(gate) * up))
        return cast(Tensor, self.down_proj(glu(gate, up, activation)))
