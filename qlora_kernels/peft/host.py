"""Host: the model as the methods see it, by names that stay the same whatever has been wrapped."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..nn.experts_nf4 import ExpertsNF4, is_expert_stack
from ..nn.module_tree import move_hooks, set_submodule
from .adapted_linear import AdaptedEmbedding, AdaptedLinear
from .anatomy import Anatomy, Layer, anatomy
from .base_layer import is_embedding, is_linear, is_quantized
from .selection import Selection
from .torch_attention import rejoin, split

if TYPE_CHECKING:
    from .method import Method


class Host:
    """The base model, the selection of adapters, and the adapters themselves."""

    def __init__(self, model: nn.Module, adapter_dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.adapter_dtype = adapter_dtype
        self.selection = Selection()
        self.adapters: dict[str, list[Method]] = {}
        self.split_attention()

    def split_attention(self) -> None:
        """Takes torch's packed attention apart; rejoin_attention puts it back."""
        for name, module in list(self.model.named_modules()):
            if (part := split(module, self.selection)) is not module:
                set_submodule(self.model, name, part)
            if isinstance(module, nn.TransformerEncoder):
                # Nested tensors lead to the fast path that the parts must not take.
                module.use_nested_tensor = False

    def rejoin_attention(self) -> None:
        for name, module in list(self.model.named_modules()):
            if (whole := rejoin(module)) is not module:
                set_submodule(self.model, name, whole)

    @cached_property
    def anatomy(self) -> Anatomy:
        return anatomy(self.modules())

    @staticmethod
    def canonical(name: str) -> str:
        """The name before wrapping: `q_proj.base_layer.bias` is `q_proj.bias`."""
        return name.replace(".base_layer.", ".").removesuffix(".base_layer")

    def modules(self) -> dict[str, nn.Module]:
        """Every module of the base model by its canonical name; a wrapped layer stands for itself, unwrapped."""
        return {self.canonical(n): m for n, m in self.model.named_modules() if not isinstance(m, AdaptedLinear)}

    def linears(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.modules().items() if is_linear(module)}

    def expert_stacks(self) -> list[str]:
        """Paths of the [experts, out, in] weights that a module holds as parameters, dense or as ExpertsNF4."""
        found = []
        for name, module in self.modules().items():
            if isinstance(module, ExpertsNF4):
                found.append(name)
            leaves = module.named_parameters(prefix=name, recurse=False)
            found += [path for path, leaf in leaves if is_expert_stack(module, leaf) and leaf.shape[0] > 1]
        return found

    def module(self, path: str) -> nn.Module:
        """The module at a canonical path, unwrapped."""
        module: nn.Module = self.model
        for part in path.split(".") if path else ():
            module = module.get_submodule(part)
            if isinstance(module, AdaptedLinear):
                module = module.base_layer
        return module

    def place(self, path: str) -> nn.Module:
        """What stands at `path` now, wrapped or not: hooks registered on it stay at that place."""
        return self.model.get_submodule(path)

    def dtype(self) -> torch.dtype:
        """That of most of the model's own dense parameters."""
        trained = {id(p) for methods in self.adapters.values() for m in methods for p in m.parameters()}
        coded = {id(p) for m in self.modules().values() if is_quantized(m) for p in m.parameters(recurse=False)}
        sizes: dict[torch.dtype, int] = {}
        for p in self.model.parameters():
            if p.is_floating_point() and id(p) not in trained | coded:
                sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.get_default_dtype())

    def width(self, layer: Layer) -> int:
        """Size d of the residual stream."""
        return next(self.module(layer.norms[0]).parameters()).numel()

    def adapt(self, path: str) -> AdaptedLinear:
        """The AdaptedLinear at `path`, put there if it is not yet."""
        layer = self.model.get_submodule(path)
        if not isinstance(layer, AdaptedLinear):
            base, kind = layer, AdaptedEmbedding if is_embedding(layer) else AdaptedLinear
            layer = kind(base, self.selection)
            move_hooks(base, layer)
            set_submodule(self.model, path, layer)
        return layer

    def layer_of(self, path: str) -> Layer | None:
        """The transformer layer that the module at `path` is a part of."""
        return next((layer for layer in self.anatomy.layers if path.startswith(f"{layer.path}.")), None)

    def adapted(self) -> dict[str, AdaptedLinear]:
        return {name: m for name, m in self.model.named_modules() if isinstance(m, AdaptedLinear)}

    def release(self, path: str, name: str) -> None:
        """Takes adapter `name` off the layer at `path`, and the wrapper with the last of them."""
        layer = self.model.get_submodule(path)
        if isinstance(layer, AdaptedLinear):
            layer.deltas.pop(name, None)
            if not layer.deltas:
                self.unwrap(path, layer)

    def unwrap(self, path: str, layer: AdaptedLinear) -> None:
        move_hooks(layer, layer.base_layer)
        set_submodule(self.model, path, layer.base_layer)
