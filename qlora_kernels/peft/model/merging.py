"""Merging adapters into the layers that they adapt, and updating ties and settings of the model afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from ...nn.experts_nf4 import ExpertsNF4
from ..framework.injector import Injector
from ..framework.method import methods_of
from ..layers.base_layer import is_quantized
from ..methods.tied_lora import tie_merged


def check_mergeable(injector: Injector, names: Sequence[str]) -> None:
    """Raise ValueError for an adapter that is not an update of weights."""
    for name in names:
        for method in methods_of(injector, name):
            if reason := method.merge_unsupported():
                raise ValueError(
                    f"merge: each adapter must be an update of weights, got {name!r}, which cannot be merged: "
                    f"{reason}; keep it unmerged, or merge the others by adapter_names"
                )


def merge(injector: Injector, names: Sequence[str], *, target: str, safe_merge: bool) -> None:
    """Compute with merged layers, see PeftModel.merge_adapter; warn of the error of quantizing again."""
    dtype = injector.dtype()
    with injector.selection.within(active=tuple(names), enabled=True, rows=None):  # the biases of these adapters
        norms = [
            layer.merge(names, target=target, safe_merge=safe_merge, default=dtype)
            for layer in injector.adapted_layers().values()
            if any(name in layer.deltas for name in names)
        ]
        norms += [
            updates.merge(injector.own_value(path), names, target=target, safe_merge=safe_merge)
            for path, updates in injector.adapted_parameters().items()
            if any(name in updates for name in names)
        ]
    error, update = (math.hypot(*(pair[i] for pair in norms)) for i in (0, 1))
    merged = [layer.merged_layer for layer in injector.adapted_layers().values() if layer.merged_layer is not None]
    stacks = [stack for updates in injector.adapted_parameters().values() for stack in updates.merged]
    if update and (any(map(is_quantized, merged)) or any(isinstance(stack, ExpertsNF4) for stack in stacks)):
        warnings.warn(f"merge: quantizing again cost |error|/|update| = {error / update:.1%}", stacklevel=3)


def check_active(injector: Injector, names: Sequence[str]) -> None:
    """Raise ValueError for an adapter that replaces parameters and is not active: merging would not include them."""
    for name in names:
        replaced = [path for method in methods_of(injector, name) for path in method.overrides.paths]
        if replaced and name not in injector.selection.active:
            raise ValueError(
                f"merge: adapter {name!r} must be active, since it replaces {min(replaced)}; call set_adapter"
            )


def unmerge(injector: Injector) -> None:
    """Compute with the layers' own weights again."""
    for layer in injector.adapted_layers().values():
        layer.unmerge()
    for updates in injector.adapted_parameters().values():
        updates.unmerge()


def is_merged(injector: Injector, name: str) -> bool:
    """Whether some weight includes the update of adapter `name`."""
    merged = [layer.merged_names for layer in injector.adapted_layers().values()]
    merged += [updates.merged_names for updates in injector.adapted_parameters().values()]
    return any(name in names for names in merged)


def keep_merged(injector: Injector, names: Sequence[str]) -> None:
    """Make the merged layers, and the parameters that the adapters replace, the model's own permanently."""
    _warn_of_ties(injector)
    tie_merged(injector)
    for layer in injector.adapted_layers().values():
        layer.keep_merged()
    for path, updates in injector.adapted_parameters().items():
        if (merged := updates.kept_merged()) is not None:
            injector.set_own_value(path, merged)
    for name in names:
        for method in methods_of(injector, name):
            method.overrides.keep()


def _warn_of_ties(injector: Injector) -> None:
    merged = {path: layer for path, layer in injector.adapted_layers().items() if layer.merged_layer is not None}
    others = {
        id(parameter)
        for path, module in injector.modules().items()
        if path not in merged
        for parameter in module.parameters(recurse=False)
    }
    for path, layer in merged.items():
        if id(layer.base_layer._parameters.get("weight")) in others:
            # The merged weight is a new tensor; the tensor to which the layer was tied keeps its values.
            warnings.warn(f"merge: {path} was tied to another layer and is so no more", stacklevel=4)
