"""One LoRA for layers that share a weight, such as an embedding and the head tied to it.

An embedding is a linear layer with one-hot inputs whose W is the transpose of its table. The table is also the W of the
head. The factors of the head are therefore the factors of the embedding, transposed and exchanged. Source: PEFT's
ensure_weight_tying.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...nn.module_tree import has_hooks
from ..core.offloaded import weight_of
from ..framework.injector import Injector
from ..layers.adapted_linear import AdaptedLinear
from ..layers.delta import Delta
from ..layers.lowrank import LoraFactors, add_lowrank

_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


class TransposedLora(Delta):
    """Update of a linear layer whose weight is the table of an embedding with LoRA.

    It holds the parameters of the embedding's LoRA, lora_embedding_A [r, N] and lora_embedding_B [K, r]. State dicts
    have the names and shapes of a linear layer: lora_A.weight [r, K], lora_B.weight [N, r].
    """

    def __init__(self, embedding: Delta, scaling: float, dropout_p: float) -> None:
        super().__init__()
        for name in _EMBEDDING:
            self.register_parameter(name, embedding._parameters[name])
        self.scaling, self.dropout_p = scaling, dropout_p

    def lowrank(self) -> LoraFactors:
        return weight_of(self, "lora_embedding_B").T, weight_of(self, "lora_embedding_A").T, self.scaling

    def factors(self) -> LoraFactors | None:
        return None if has_hooks(self) else self.lowrank()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        return add_lowrank(x, y, [self.lowrank()], dropout_p=self.dropout_p if self.training else 0.0)

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy lora_A [r, K] and lora_B [N, r] into the embedding's parameters, transposed."""
        own_A, own_B, _ = self.lowrank()
        own_A.data.copy_(lora_A)
        own_B.data.copy_(lora_B)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, factor in zip(("lora_A", "lora_B"), self.lowrank()[:2], strict=True):
            destination[f"{prefix}{name}.weight"] = factor if keep_vars else factor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = zip(("lora_A", "lora_B"), reversed(_EMBEDDING), strict=True)
        renamed = {f"{prefix}{own}": f"{prefix}{name}.weight" for name, own in names}
        given = {own: state_dict[key].T for own, key in renamed.items() if key in state_dict}
        missing: list[str] = []
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing, [], error_msgs)
        missing_keys += [renamed[own] for own in missing]
        if strict:
            beyond = (key for key in state_dict if key.startswith(prefix) and key not in renamed.values())
            unexpected_keys += list(beyond)


def shared(delta: Delta, first: Delta, path: str) -> Delta:
    """Return the update of the layer at `path` with the parameters of `first`, the update of a layer with the same
    weight.

    delta: the update that the layer has if its parameters are not shared.
    Raises ValueError for another rank and NotImplementedError for kinds of updates that cannot share parameters.
    """
    of_embedding = all(name in first._parameters for name in _EMBEDDING)
    ranks = [update.lowrank()[0].shape[0] for update in (delta, first)]
    if ranks[0] != ranks[1]:
        raise ValueError(
            f"rank_pattern: layers that share a weight must have one rank with ensure_weight_tying, got {ranks[0]} for "
            f"{path} and {ranks[1]} for the first of them"
        )
    if of_embedding and _EMBEDDING[0] not in delta._parameters and not hasattr(first, "lora_magnitude_vector"):
        return TransposedLora(first, cast(Any, delta).scaling, delta.dropout_p)
    if type(delta) is not type(first) or any(True for _ in delta.buffers()):
        raise NotImplementedError(
            f"LoRA: ensure_weight_tying must be False for {path}, a {type(delta).__name__} whose weight is that of a "
            f"layer with a {type(first).__name__}; leave one of the two layers out of target_modules"
        )
    for name, parameter in first.named_parameters():
        owner, _, leaf = name.rpartition(".")
        delta.get_submodule(owner).register_parameter(leaf, parameter)
    return delta


def same_tensors(one: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors of two tied layers in a file, by their names in the file, are the same update."""
    if _EMBEDDING[0] in first and _EMBEDDING[0] not in one:
        first = {"lora_A.weight": first[_EMBEDDING[1]].T, "lora_B.weight": first[_EMBEDDING[0]].T}
    return one.keys() == first.keys() and all(torch.equal(tensor, first[name]) for name, tensor in one.items())


def tie_merged(injector: Injector) -> None:
    """Tie merged layers again if they shared one weight and one update."""
    merged = [layer for layer in injector.adapted_layers().values() if layer.merged_layer is not None]
    for number, layer in enumerate(merged):
        for first in merged[:number]:
            ours, theirs = cast(Any, layer.merged_layer), cast(Any, first.merged_layer)
            if _one_update(layer, first) and "weight" in ours._parameters and "weight" in theirs._parameters:
                ours.weight = theirs.weight
                break


def _one_update(layer: AdaptedLinear, first: AdaptedLinear) -> bool:
    weight = layer.base_layer._parameters.get("weight")
    if weight is None or weight is not first.base_layer._parameters.get("weight"):
        return False
    if layer.merged_names != first.merged_names:
        return False
    return all(
        name in layer.deltas and name in first.deltas and _share_factors(layer.deltas[name], first.deltas[name])
        for name in layer.merged_names
    )


def _share_factors(one: Any, other: Any) -> bool:
    same_parameters = {id(p) for p in one.parameters()} == {id(p) for p in other.parameters()}
    return bool(same_parameters and one.scaling == other.scaling)
