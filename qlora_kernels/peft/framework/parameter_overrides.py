"""ParameterOverrides: an adapter's own copies of some of the model's parameters, used while the adapter is active."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...nn.match import matches
from ..core.sharded import full_tensor
from ..layers.base_layer import is_quantized
from ..layers.overridden_module import SLOT, AdapterCopies, override, restore
from .ties import paths_of_tied

if TYPE_CHECKING:
    from .injector import Injector


class ParameterOverrides:
    """An adapter's copies of parameters, for full fine-tuning, BitFit, LayerNorms, bias options and modules_to_save.

    `paths`: canonical path of an overridden parameter -> its path in the adapter's file. Modules and copies are looked
    up by these paths on each use. Tied parameters have one copy.
    Copies of fp16 and bf16 parameters are kept in the injector's adapter_dtype, fp32 by default, and cast to the dtype
    of the original when they are used, so that training has fp32 masters.
    """

    def __init__(self, injector: Injector, name: str) -> None:
        self.injector, self.name = injector, name
        self.paths: dict[str, str] = {}
        self.keys: dict[str, str] = {}  # path of the owning module -> entry of its overrides
        self.kept = False
        self.fixed: set[str] = set()  # paths of copies that never train

    def add(self, path: str, *, stored_as: str | None = None) -> None:
        """Copy the parameter at `path`; a tied parameter gets one copy for all its paths.

        stored_as: its path in the file, if it differs from `path`.
        """
        owner, _, attribute = path.rpartition(".")
        module = self.injector.module(owner)
        if path in self.paths or any(self.injector.module(o) is module for o in self._owners_of(attribute)):
            return
        original = cast(nn.Parameter, module._parameters[attribute])
        tied = next((p for p in self.paths if self.original(p) is original), None)
        overrides = override(module, attribute, self.injector.selection)
        if owner not in self.keys:
            self.keys[owner] = overrides.add(self.name, AdapterCopies(self.name))
        copy = self.copy(tied) if tied is not None else self._new_copy(original)
        overrides[self.keys[owner]].register_parameter(attribute, copy)
        self.paths[path] = stored_as or path

    def add_modules(self, suffixes: Iterable[str]) -> None:
        """Copy every parameter of the modules whose name is, or ends with, one of the suffixes.

        Raises ValueError if such a module has quantized weights, because these cannot be trained.
        """
        wanted = tuple(suffixes)
        modules = self.injector.modules(aliases=True)
        for name in modules:
            if matches(wanted, name):
                inside = {n: m for n, m in modules.items() if f"{n}.".startswith(f"{name}.")}
                if any(is_quantized(m) for m in inside.values()):
                    raise ValueError(
                        f"modules_to_save: {name} must not be quantized; name it in replace_linear's skip or in "
                        "QLoRAKernelsConfig's skip_modules"
                    )
                for owner, part in inside.items():
                    for attribute, parameter in part._parameters.items():
                        if parameter is not None:
                            self.add(f"{owner}.{attribute}" if owner else attribute)

    def add_tied(self) -> None:
        """Let parameters that are tied to copied parameters share their copies."""
        tied = paths_of_tied(self.injector.modules(aliases=True))
        for path in list(self.paths):
            for other in tied.get(path, ()):
                self.add(other)

    def add_fixed(self, path: str, value: Tensor, *, stored_as: str | None = None) -> None:
        """Replace the parameter at `path` by a value that does not train."""
        self.add(path, stored_as=stored_as)
        self.set_copy(path, nn.Parameter(value.to(cast(Tensor, self.copy(path))), requires_grad=False))
        self.fixed.add(path)

    def tied(self) -> dict[str, str]:
        """Return, for copies with several paths in the file, each further path -> the first path."""
        copies = self.copies
        return {self.paths[p]: self.paths[f] for p, copy in copies.items() if (f := _first(copies, copy)) != p}

    def untie(self, stored_as: str) -> None:
        """Give the parameter with this path in the file a separate copy."""
        path = next(path for path, stored in self.paths.items() if stored == stored_as)
        copy = cast(nn.Parameter, self.copy(path))
        self.set_copy(path, nn.Parameter(copy.detach().clone(), requires_grad=copy.requires_grad))

    def _owners_of(self, attribute: str) -> list[str]:
        return [path.rpartition(".")[0] for path in self.paths if path.rpartition(".")[2] == attribute]

    def _new_copy(self, original: nn.Parameter) -> nn.Parameter:
        dtype = original.dtype
        if original.is_floating_point():
            dtype = torch.promote_types(dtype, self.injector.adapter_dtype)
        return nn.Parameter(original.detach().to(dtype, copy=True), requires_grad=original.is_floating_point())

    def original(self, path: str) -> nn.Parameter | None:
        """Return the model's own parameter at `path`."""
        owner, _, attribute = path.rpartition(".")
        return self.injector.module(owner)._parameters.get(attribute)

    def copy(self, path: str) -> nn.Parameter | None:
        """Return the adapter's copy of the parameter at `path`; None if the module was replaced since."""
        owner, _, attribute = path.rpartition(".")
        overrides = self.injector.module(owner)._modules.get(SLOT)
        key = self.keys[owner]
        if overrides is None or key not in cast(nn.ModuleDict, overrides):
            return None
        return cast(nn.ModuleDict, overrides)[key]._parameters.get(attribute)

    def set_copy(self, path: str, copy: nn.Parameter) -> None:
        """Replace the copy at `path` by another parameter, also if the module was replaced."""
        owner, _, attribute = path.rpartition(".")
        overrides = override(self.injector.module(owner), attribute, self.injector.selection)
        if self.keys[owner] not in overrides:
            overrides[self.keys[owner]] = AdapterCopies(self.name)
        overrides[self.keys[owner]].register_parameter(attribute, copy)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the copies by the paths of the originals, tied ones once."""
        copies = self.copies
        return {path: copy for path, copy in copies.items() if _first(copies, copy) == path}

    @property
    def copies(self) -> dict[str, nn.Parameter]:
        """Return the copies by the paths of the originals, tied ones under each path."""
        return {path: copy for path in self.paths if (copy := self.copy(path)) is not None}

    @property
    def originals(self) -> dict[str, nn.Parameter]:
        """Return the model's own parameters that have copies."""
        return {path: original for path in self.paths if (original := self.original(path)) is not None}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the file: the values used while the adapter is active, with tied ones under the first
        path.

        If a module was replaced or re-parametrized after the adapter was added, these values are not the copy.
        """
        tensors: dict[str, Tensor] = {}
        with self.injector.selection.within(active=(self.name,), enabled=True, rows=None):
            for path in self.paths:
                owner, _, attribute = path.rpartition(".")
                module = self.injector.module(owner)
                copy = None if parametrize.is_parametrized(module, attribute) else self.copy(path)
                tensors[path] = getattr(module, attribute).detach() if copy is None else copy
        return {self.paths[path]: full_tensor(t.detach()) for path, t in tensors.items() if _first(tensors, t) == path}

    def detach(self) -> None:
        """Remove the copies from the model."""
        for owner, key in self.keys.items():
            module = self.injector.module(owner)
            overrides = module._modules.get(SLOT)
            if overrides is not None and key in cast(nn.ModuleDict, overrides):
                del cast(nn.ModuleDict, overrides)[key]
            restore(module)
        self.paths, self.keys = {}, {}

    def keep(self) -> None:
        """Replace the model's own parameters by the copies permanently, in the dtypes of the originals."""
        made: dict[int, nn.Parameter] = {}
        for path in self.paths:
            original, copy = self.original(path), self.copy(path)
            if original is not None and copy is not None:  # a merged layer already includes its bias
                own = nn.Parameter(copy.detach().to(original.dtype), requires_grad=False)
                owner, _, attribute = path.rpartition(".")
                self.injector.module(owner).register_parameter(attribute, made.setdefault(id(copy), own))
        self.kept = True


def _first(tensors: dict[str, Tensor] | dict[str, nn.Parameter], wanted: Tensor) -> str:
    return next(path for path, tensor in tensors.items() if tensor is wanted)
