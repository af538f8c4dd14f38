"""Host: the model as the methods see it, by names that stay the same whatever has been wrapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .adapted_linear import AdaptedLinear
from .base_layer import is_linear
from .selection import Selection
from .tree import set_module

if TYPE_CHECKING:
    from .method import Method


class Host:
    """The base model, the selection of adapters, and the adapters themselves."""

    def __init__(self, model: nn.Module, adapter_dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.adapter_dtype = adapter_dtype
        self.selection = Selection()
        self.adapters: dict[str, list[Method]] = {}

    @staticmethod
    def canonical(name: str) -> str:
        """The name before wrapping: `q_proj.base_layer.bias` is `q_proj.bias`."""
        return name.replace(".base_layer.", ".").removesuffix(".base_layer")

    def modules(self) -> dict[str, nn.Module]:
        """Every module of the base model by its canonical name; a wrapped layer stands for itself, unwrapped."""
        return {self.canonical(n): m for n, m in self.model.named_modules() if not isinstance(m, AdaptedLinear)}

    def linears(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.modules().items() if is_linear(module)}

    def module(self, path: str) -> nn.Module:
        """The module at a canonical path, unwrapped."""
        module: nn.Module = self.model
        for part in path.split(".") if path else ():
            module = module.get_submodule(part)
            if isinstance(module, AdaptedLinear):
                module = module.base_layer
        return module

    def adapt(self, path: str) -> AdaptedLinear:
        """The AdaptedLinear at `path`, put there if it is not yet."""
        layer = self.model.get_submodule(path)
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear(layer, self.selection)
            set_module(self.model, path, layer)
        return layer

    def adapted(self) -> dict[str, AdaptedLinear]:
        return {name: m for name, m in self.model.named_modules() if isinstance(m, AdaptedLinear)}

    def release(self, path: str, name: str) -> None:
        """Takes adapter `name` off the layer at `path`, and the wrapper with the last of them."""
        layer = self.model.get_submodule(path)
        if isinstance(layer, AdaptedLinear):
            layer.deltas.pop(name, None)
            if not layer.deltas:
                set_module(self.model, path, layer.base_layer)
