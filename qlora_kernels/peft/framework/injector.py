"""Injector: a model by canonical module names, and the operations that put adapters into it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...nn.experts_nf4 import ExpertsNF4, is_expert_stack
from ...nn.functional_use import weights_computed_with
from ...nn.module_tree import WRAPPED, move_hooks, names_of, output_embeddings_of, set_submodule, unwrapped
from ..attention.model_layout import ModelLayout, TransformerLayer, model_layout
from ..attention.torch_attention import join_attention, split_attention
from ..core.adapter_selection import AdapterSelection
from ..core.adapter_tree import AdapterModules
from ..layers.adapted_linear import AdaptedConvolution, AdaptedEmbedding, AdaptedLinear, base_of
from ..layers.base_layer import is_convolution, is_embedding, is_linear, is_quantized
from ..layers.overridden_module import UPDATES, ParameterCopies, override, restore
from ..layers.parameter_lora import ParameterUpdates


class Injector:
    """The base model, its adapters, the selection of active ones, and access to the places of their modules.

    model: the model inside torch's wrappers (torch.compile, DistributedDataParallel, FSDP, activation checkpointing).
    Names also leave out wrappers inside the model, whether they were added before or after the adapters.
    prompts: the slot for modules that belong to the whole model, a child of the PeftModel.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_dtype: torch.dtype = torch.float32,
        prompts: AdapterModules | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self.adapter_dtype = adapter_dtype
        self.prompts = AdapterModules() if prompts is None else prompts
        self.selection = AdapterSelection()
        self.adapters: dict[str, list[Any]] = {}  # values are of type Method, whose module imports this one
        self.split_attention()

    def split_attention(self) -> None:
        """Split torch's packed attention; join_attention restores it."""
        split_attention(self.model, self.selection)

    def join_attention(self) -> None:
        """Undo split_attention: restore the packed modules, with the present weights."""
        join_attention(self.model)

    # The model by names

    @cached_property
    def layout(self) -> ModelLayout:
        """The transformer layers of the model and their parts. Raises NotImplementedError for unknown families."""
        return model_layout(self.modules())

    @staticmethod
    def canonical(name: str) -> str:
        """Return the name without wrappers: `_orig_mod.q_proj.base_layer.bias` becomes `q_proj.bias`."""
        return ".".join(part for part in name.split(".") if part not in ("base_layer", *WRAPPED))

    def modules(self, *, aliases: bool = False) -> dict[str, nn.Module]:
        """Return every module of the base model by canonical name, without those of adapters, and with wrapped layers
        unwrapped.

        aliases: include all names of a module that the model has under several names.
        """
        found: dict[str, nn.Module] = {}
        seen: set[int] = set()

        def visit(name: str, module: nn.Module) -> None:
            module = base_of(unwrapped(module))
            if isinstance(module, AdapterModules) or (id(module) in seen and not aliases):
                return
            seen.add(id(module))
            found[name] = module
            for child_name, child in module._modules.items():
                if child is not None:
                    visit(f"{name}.{child_name}" if name else child_name, child)

        visit("", self.model)
        return found

    def linears(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.modules().items() if is_linear(module)}

    def expert_stacks(self) -> list[str]:
        """Return the paths of [experts, out, in] weights that a module holds as parameters, dense or as ExpertsNF4."""
        found = []
        for name, module in self.modules().items():
            if isinstance(module, ExpertsNF4):
                found.append(name)
            leaves = module.named_parameters(prefix=name, recurse=False)
            found += [path for path, leaf in leaves if is_expert_stack(module, leaf)]
        return found

    def module(self, path: str) -> nn.Module:
        """Return the module at a canonical path, unwrapped."""
        return base_of(self.called_module(path))

    def called_module(self, path: str) -> nn.Module:
        """Return the module at a canonical path, or its AdaptedLinear if it has one."""
        module: nn.Module = self.model
        for part in path.split(".") if path else ():
            module = unwrapped(base_of(module).get_submodule(part))
        return module

    def hooked_module(self, path: str) -> nn.Module:
        """Return the module that is called at `path`, wrapped or not, on which hooks are registered.

        For an nn.Sequential this is its last layer, because the container would call an adapter that is added as its
        child.
        """
        module = self.called_module(path)
        while isinstance(module, nn.Sequential) and len(module):
            module = unwrapped(module[-1])
        return module

    def dtype(self) -> torch.dtype:
        """Return the dtype of most of the model's own dense parameters."""
        trained = {id(p) for methods in self.adapters.values() for m in methods for p in m.parameters()}
        coded = {id(p) for m in self.modules().values() if is_quantized(m) for p in m.parameters(recurse=False)}
        sizes: dict[torch.dtype, int] = {}
        for p in self.model.parameters():
            if p.is_floating_point() and id(p) not in trained | coded:
                sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.get_default_dtype())

    def width(self, layer: TransformerLayer) -> int:
        """Return the width d of the residual stream."""
        return next(self.module(layer.norms[0]).parameters()).numel()

    def layer_of(self, path: str) -> TransformerLayer | None:
        """Return the transformer layer that contains the module at `path`."""
        return next((layer for layer in self.layout.layers if path.startswith(f"{layer.path}.")), None)

    # Adapted layers

    def weights_read(self, paths: Iterable[str]) -> set[str]:
        """Return those of `paths` with the weight of whose layer the model's code may compute."""
        layers = {path: self.module(path) for path in paths}
        read = weights_computed_with(self.model, layers.values())
        return {path for path, layer in layers.items() if layer in read}

    def adapt(self, path: str, weight_is_read: bool | None = None) -> AdaptedLinear:
        """Return the AdaptedLinear at `path`; if there is none, create it under all names of the layer.

        weight_is_read: whether the model's code may compute with the layer's weight; None determines it.
        Raises ValueError for a layer that is compiled by itself, because its compiled forward would not call the
        adapter.
        """
        layer = self.called_module(path)
        if not isinstance(layer, AdaptedLinear):
            parent = base_of(self.called_module(path.rpartition(".")[0]))
            if "_orig_mod" in parent.get_submodule(path.rpartition(".")[2])._modules:
                raise ValueError(
                    f"target_modules: {path} must not be compiled by itself, since its compiled forward would not see "
                    "the adapter; compile the layer after get_peft_model, or a module that contains it"
                )
            base = layer
            kind = AdaptedConvolution if is_convolution(base) else AdaptedLinear
            layer = (AdaptedEmbedding if is_embedding(base) else kind)(base, self.selection)
            layer.weight_is_read = path in self.weights_read([path]) if weight_is_read is None else weight_is_read
            layer.is_output_head = base is output_embeddings_of(self.model)
            self._replace(base, layer)
        return layer

    def adapted_layers(self) -> dict[str, AdaptedLinear]:
        """Return the wrapped layers by their canonical names."""
        return {self.canonical(name): m for name, m in self.model.named_modules() if isinstance(m, AdaptedLinear)}

    def unwrap(self, layer: AdaptedLinear) -> None:
        """Replace an adapted layer by its base layer."""
        self._replace(layer, layer.base_layer)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Replace `old` by `new`, and move the hooks and the adapters' modules that the hooks run."""
        names = names_of(self.model, old)
        move_hooks(old, new)
        for slot, child in list(old._modules.items()):
            if isinstance(child, AdapterModules) and not isinstance(child, ParameterCopies) and slot != "deltas":
                del old._modules[slot]
                new.add_module(slot, child)
        for name in names:
            set_submodule(self.model, name, new)

    def adapt_parameter(self, path: str) -> ParameterUpdates:
        """Return the ParameterUpdates of the parameter at `path`, created if there are none."""
        owner, _, attribute = path.rpartition(".")
        module = self.module(owner)
        if attribute + UPDATES not in module._modules:
            override(module, attribute, self.selection)
            module.add_module(attribute + UPDATES, ParameterUpdates(self.selection))
        return cast(ParameterUpdates, module._modules[attribute + UPDATES])

    def adapted_parameters(self) -> dict[str, ParameterUpdates]:
        """Return the updates of parameters by the canonical paths of the parameters."""
        updates = {n: m for n, m in self.model.named_modules() if isinstance(m, ParameterUpdates)}
        return {self.canonical(name).removesuffix(UPDATES): module for name, module in updates.items()}

    def own_value(self, path: str) -> nn.Parameter | ExpertsNF4:
        """Return the model's own parameter at a path, or its quantized experts."""
        owner, _, attribute = path.rpartition(".")
        module = self.module(owner)
        stored: Any = module._parameters.get(attribute)
        return stored if stored is not None else cast(ExpertsNF4, module._modules[attribute])

    def set_own_value(self, path: str, value: Tensor | ExpertsNF4) -> None:
        """Replace the model's own value at a path for good."""
        owner, _, attribute = path.rpartition(".")
        module = self.module(owner)
        if isinstance(value, ExpertsNF4):
            module._parameters.pop(attribute, None)
            module._modules[attribute] = value
        else:
            module._modules.pop(attribute, None)
            module._parameters[attribute] = nn.Parameter(value.detach(), requires_grad=False)

    # Places of the adapters' modules

    def slot(self, owner: str | None, slot: str) -> AdapterModules:
        """Return the child `slot` of the model's module at `owner`, which holds adapters' modules; created if it does
        not exist.
        """
        if owner is None:
            return self.prompts
        module = self.hooked_module(owner)
        if slot not in module._modules:
            module.add_module(slot, AdapterModules())
        return cast(AdapterModules, module._modules[slot])

    def remove(self, owner: str | None, slot: str, key: str) -> None:
        """Remove an entry from a slot, an empty slot from its module, and a wrapper without updates from the model."""
        if owner is None:
            self.prompts.pop(key)
            return
        module = self.hooked_module(owner)
        entries = cast(AdapterModules, module._modules.get(slot) or AdapterModules())
        if key in entries:
            del entries[key]
        if isinstance(module, AdaptedLinear) and slot == "deltas":
            if not len(module.deltas):
                self.unwrap(module)
        elif not len(entries):
            module._modules.pop(slot, None)
            if slot.endswith(UPDATES):
                restore(module)
