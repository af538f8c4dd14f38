"""fuse_shared_input: adapted NF4 layers of one parent that read the same tensor (q, k, v; gate, up) run as one op.

A model calls such layers one after another on the same tensor. The first layer computes the outputs of all of them by
LinearNF4.forward_lora_group. Each other layer returns its pending output if it is called on the same tensor object,
unmodified, in the same grad mode and autocast dtype; otherwise it computes its output itself. Each output is returned
once, and no tensor is held after the last one was returned.

This is safe under:
  checkpointing   the recomputation begins with the first layer, which always computes again
  autograd        the outputs belong to one node, which runs backward once, with zeros for unused outputs
  exceptions      pending outputs stay until the first layer runs again, and are returned only for their input tensor
  threads         a call stores its outputs as one object, so two calls cannot mix; on a race one of them recomputes
Under torch.compile a write into the tensor between the calls is not detected; models with such writes must not be
fused.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...nn.linear_nf4 import LinearNF4
from .adapted_linear import AdaptedLinear

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of sibling layers that read one tensor in common architectures, in the order of their calls."""


def fuse_shared_input(model: nn.Module, groups: Sequence[Sequence[str]] = GROUPS) -> list[tuple[str, ...]]:
    """Run adapted NF4 layers that read the same tensor as one op, with one pass over x and one sum of its gradient.

    model: after get_peft_model, in place. Names, parameters, hooks and files stay as they are.
    groups: names of layers under one parent, in the order in which the model calls them. In each group, the layers with
    LoRA over LinearNF4 are fused if there are at least two. A group whose layers read different tensors gives a warning
    and runs unfused.
    Dropout: the layers of a group share one mask, while unfused layers draw separate masks. Without dropout only the
    order of additions changes.
    Returns the names of each fused group. Raises ValueError if there is none.
    """
    fused = []
    for path, parent in model.named_modules():
        children = dict(parent.named_children())
        for group in groups:
            members = {name: children[name] for name in group if _can_join(children.get(name))}
            layers = [layer for layer in members.values() if isinstance(layer, AdaptedLinear)]
            if len(layers) >= 2 and len({layer.in_features for layer in layers}) == 1:
                names = tuple(f"{path}.{name}" if path else name for name in members)
                shared = FusedProjections(layers, names)
                for layer in layers:
                    layer.fused_projections = shared
                fused.append(names)
    if not fused:
        raise ValueError(
            "fuse_shared_input: model must have two or more LoRA layers over LinearNF4 side by side under names of one "
            f"of the groups {[tuple(group) for group in groups]}, got none; call it after get_peft_model"
        )
    return fused


def unfuse_shared_input(model: nn.Module) -> None:
    """Undo fuse_shared_input: every layer computes its own output again."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.fused_projections = None


def _can_join(module: nn.Module | None) -> bool:
    return isinstance(module, AdaptedLinear) and isinstance(module.base_layer, LinearNF4)


class _PendingOutputs:
    """Outputs that a call of the first layer computed and the other layers have not returned yet."""

    def __init__(self, x: Tensor, state: tuple[object, ...], outputs: dict[int, Tensor]) -> None:
        self.x, self.state, self.outputs = x, state, outputs


class FusedProjections:
    """A group of layers that read one tensor, in the order in which the model calls them."""

    def __init__(self, layers: Sequence[AdaptedLinear], names: Sequence[str]) -> None:
        self.layers, self.names = tuple(layers), tuple(names)
        self.apart = False  # they have read different tensors
        self._shares: _PendingOutputs | None = None

    def output_of(self, layer: AdaptedLinear, x: Tensor) -> Tensor | None:
        """Return base(x) with the low-rank updates of `layer`, or None if the layer must compute its output itself."""
        if self.apart:
            return None
        place = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if place == 0:
            return self._compute(x)
        shares = self._shares
        if place is None or shares is None:  # None for a replica of a layer, as data-parallel code makes
            return None
        if shares.x is not x:
            self._part(place)
            return None
        if shares.state != _state_of(x):
            return None
        output = shares.outputs.pop(place, None)
        if not shares.outputs:
            self._shares = None
        return output

    def _compute(self, x: Tensor) -> Tensor | None:
        self._shares = None
        calls = [layer.fusable_update() for layer in self.layers]
        bases = [layer.base_layer for layer in self.layers]
        updates = [call[0] for call in calls if call is not None]
        rates = {call[1] for call in calls if call is not None}
        quantized = [base for base in bases if isinstance(base, LinearNF4) and not _trains_bias(base)]
        if not len(updates) == len(quantized) == len(self.layers) or len(rates) != 1:
            return None
        if len({base.compute_dtype for base in quantized}) != 1:
            return None
        outputs = LinearNF4.forward_lora_group(quantized, x, updates, rates.pop())
        self._shares = _PendingOutputs(x, _state_of(x), dict(enumerate(outputs[1:], start=1)))
        return outputs[0]

    def _part(self, place: int) -> None:
        self.apart, self._shares = True, None
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"fuse_shared_input: {self.names[place]} does not read the tensor that {self.names[0]} read before it; "
                "these layers run unfused from now on",
                RuntimeWarning,
                stacklevel=2,
            )


def _trains_bias(base: LinearNF4) -> bool:
    return base.bias is not None and base.bias.requires_grad


def _state_of(x: Tensor) -> tuple[object, ...]:
    """Return the state that must be equal in the first layer's call and in the calls of the others."""
    # Versions are not available while torch.compile traces, and inference tensors have none.
    version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return version, torch.is_grad_enabled(), autocast
