"""The places of the adapters' modules in the model, which are children of the modules that they change.

Code that iterates over the model therefore finds them: `parameters()`, hooks, `nn.DataParallel`, FSDP, an optimizer
over a part of the model. A module looks up its adapters among its own children, so that a replica uses its own replicas
of them.

Names in an adapter's file are PEFT's names and differ from the paths in the model; AdapterTree maps between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .sharded import full_tensor


class AdapterModules(nn.ModuleDict):
    """A child of a module of the model that holds the modules of adapters, by the names of the adapters.

    A second module of one adapter in the same slot gets the adapter's name followed by a number.
    """

    holds_adapters = True
    """Marks this child and everything below it as not part of the model's own layers."""

    def add(self, adapter: str, module: nn.Module) -> str:
        """Add a module and return the name of its entry."""
        key, number = adapter, 1
        while key in self:
            number += 1
            key = f"{adapter}_{number}"
        self[key] = module
        return key


@dataclass(frozen=True)
class Place:
    """An entry `key` of the child `slot` of the module `owner`, or the module at `inner` below that entry.

    owner: canonical path; None for the prompts, which belong to the whole model.
    """

    owner: str | None
    slot: str
    key: str
    inner: str = ""
    in_file: bool = True


class SlotOwner(Protocol):
    """The interface of Injector that AdapterTree uses: access to the slots of the model's modules."""

    def slot(self, owner: str | None, slot: str) -> AdapterModules:
        """Return the child `slot` of the module at `owner`, created if it does not exist."""

    def remove(self, owner: str | None, slot: str, key: str) -> None:
        """Remove the entry `key` from a slot, and the slot with its last entry."""


class AdapterTree:
    """The modules of one adapter by the paths that they have in its file.

    Modules are looked up by these paths on each use; this object holds no reference to them.
    """

    def __init__(self, injector: SlotOwner, name: str) -> None:
        self.injector, self.name = injector, name
        self.places: dict[str, Place] = {}

    def add(self, path: str, module: nn.Module, *, owner: str | None, slot: str, in_file: bool = True) -> Place:
        """Make `module` a part of the adapter: a child of the model's module at `owner`.

        path: its name in the file, if the file contains it.
        """
        key = self.injector.slot(owner, slot).add(self.name, module)
        place = self.places[path] = Place(owner, slot, key, in_file=in_file)
        return place

    def add_inner(self, path: str, place: Place, inner: str) -> None:
        """Give the module at `inner` below `place` a separate name in the file."""
        self.places[path] = Place(place.owner, place.slot, place.key, inner)

    def __getitem__(self, path: str) -> nn.Module:
        place = self.places[path]
        return self.injector.slot(place.owner, place.slot)[place.key].get_submodule(place.inner)

    def train(self, mode: bool) -> None:
        for path in self.places:
            self[path].train(mode)

    def detach(self) -> None:
        """Remove the adapter's modules from the model, also if some of them were never added."""
        for owner, slot, key in dict.fromkeys((place.owner, place.slot, place.key) for place in self.places.values()):
            self.injector.remove(owner, slot, key)
        self.places = {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter once, under the first path that leads to it."""
        seen: set[int] = set()
        for path in self.places:
            for name, parameter in _own_parameters(self[path]):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}", parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each buffer once, under the first path that leads to it."""
        seen: set[int] = set()
        for path in self.places:
            for name, buffer in self[path].named_buffers():
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    yield f"{path}.{name}", buffer

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the file by their paths in the file."""
        return {
            f"{path}.{name}": full_tensor(tensor)
            for path, place in self.places.items()
            if place.in_file
            for name, tensor in effective_state(self[path]).items()
        }


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield module.named_parameters() without the base model's parameters, which an adapter's module only reads."""
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if not getattr(child, "of_base_model", False):
            yield from ((f"{name}.{below}", parameter) for below, parameter in _own_parameters(child))


def effective_state(module: nn.Module) -> dict[str, Tensor]:
    """Return module.state_dict() with the computed values of tensors that torch's parametrize replaced."""
    if not any(parametrize.is_parametrized(child) for child in module.modules()):
        return dict(module.state_dict())
    tensors = {name: tensor for name, tensor in module.state_dict().items() if "parametrizations." not in name}
    for path, child in module.named_modules():
        for name in getattr(child, "parametrizations", ()):
            tensors[f"{path}.{name}" if path else name] = getattr(child, name).detach()
    return tensors
