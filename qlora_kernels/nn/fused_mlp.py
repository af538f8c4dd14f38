"""Gated MLPs of transformers' models, down_proj(act_fn(gate_proj(x)) * up_proj(x)), on the glu op.

Projections over NF4, with LoRA or without, and the product run as one autograd node where its conditions hold.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..ops.gated_mlp import GatedMLP, gated_mlp
from ..ops.glu import glu
from ..ops.residual_block import BlockNorm
from .fused_module import FusedModule, served
from .module_tree import has_hooks
from .plain_projection import plain_projections

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
        activation = self._activation()
        if activation is None:
            return cast(Tensor, super().forward(x))
        output = self._node(x, activation, None)
        if output is not None:
            return output
        gated, upper = self.gate_proj(x), self.up_proj(x)
        if not served(gated, upper) or gated.dtype != upper.dtype or gated.shape != upper.shape:
            return cast(Tensor, self.down_proj(self.act_fn(gated) * upper))
        return cast(Tensor, self.down_proj(glu(gated, upper, activation)))

    def as_one_node(self, x: Tensor, norm: BlockNorm | None) -> Tensor | None:
        """Run the projections and the product as one autograd node, or return None if this is not supported.

        norm: of the input, to which the output is added; None for neither.
        """
        activation = self._activation()
        return None if activation is None else self._node(x, activation, norm)

    def _activation(self) -> str | None:
        """Return the op's name of the activation, or None if its module has to be called."""
        activation = activation_of(self.act_fn)
        return None if activation is None or has_hooks(self.act_fn) else activation

    def _node(self, x: Tensor, activation: str, norm: BlockNorm | None) -> Tensor | None:
        projections = plain_projections(x, self.gate_proj, self.up_proj, self.down_proj) if served(x) else None
        if projections is None:
            return None
        gate, up, down = projections
        return gated_mlp(x, GatedMLP(gate, up, down, activation, norm))
