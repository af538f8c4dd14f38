"""Counts of all weights and of trained weights of a model with adapters."""

from __future__ import annotations

import math

from torch import nn

from ..framework.injector import Injector
from ..framework.method import methods_of
from ..layers.base_layer import features, is_quantized


def count_parameters(model: nn.Module, injector: Injector) -> tuple[int, int]:
    """Return the numbers (trained, all) of the weights that the model uses.

    A merged layer is counted without its base, and an active copy without the parameter that it replaces. A quantized
    layer counts as its dense shape.
    """
    aside = {id(layer.base_layer) for layer in injector.adapted_layers().values() if layer.merged_layer is not None}
    active = [method for name in injector.selection.active for method in methods_of(injector, name)]
    replaced = {id(original) for method in active for original in method.overrides.originals.values()}
    modules = [module for module in model.modules() if id(module) not in aside]
    layers = [module for module in modules if is_quantized(module)]
    codes = {id(p) for layer in layers for p in layer.parameters(recurse=False) if p is not layer.bias}
    parameters = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    counted = [p for key, p in parameters.items() if key not in codes | replaced]
    trained = sum(p.numel() for p in counted if p.requires_grad)
    return trained, sum(p.numel() for p in counted) + sum(math.prod(features(layer)) for layer in layers)
