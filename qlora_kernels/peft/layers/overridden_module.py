"""Modules whose parameters an adapter replaces while it is active.

The module keeps its own parameters, and the adapters' copies are in its child `overrides`. Reading an overridden
attribute (`module.weight`) returns the copy of the adapter that is active in the running call, so the module's forward
and all other code that reads the attribute compute with it. As in torch's parametrize, the module's class becomes a
subclass with a property for each such attribute; unlike there, state dicts keep their names and modules can be pickled.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from ...nn.made_class import MadeClass, names_of_class
from ...nn.quantized_weight import is_sharded
from ..core.adapter_selection import AdapterSelection
from ..core.adapter_tree import AdapterModules
from ..core.offloaded import weight_of

SLOT = "overrides"
UPDATES = "_updates"
"""Suffix of the child that holds the adapters' updates of an attribute (parameter_lora.py)."""


class AdapterCopies(nn.Module):
    """One adapter's copies of parameters of one module, under the names that they have there."""

    def __init__(self, adapter: str) -> None:
        super().__init__()
        self.adapter = adapter


class ParameterCopies(AdapterModules):
    """The copies of all adapters."""

    def __init__(self, selection: AdapterSelection) -> None:
        super().__init__()
        self.selection = selection

    def active(self, attribute: str) -> Tensor | None:
        """Return the copy that applies in the running call; None for the module's own parameter."""
        for copies in self.values():
            if hasattr(copies, attribute) and self.selection.replaces(cast(AdapterCopies, copies).adapter):
                return weight_of(copies, attribute)
        return None


class _Overridden(MadeClass):
    """The mixin of all classes that _overridden_class makes."""

    plain_class: type[nn.Module]
    attributes: frozenset[str]


@cache
def _overridden_class(plain_class: type[nn.Module], attributes: frozenset[str]) -> type[nn.Module]:
    """Return a subclass of the same name in which `attributes` are read through the active overrides."""
    members: dict[str, Any] = {name: _property(name) for name in attributes}
    if issubclass(plain_class, nn.RNNBase):
        members["_flat_weights"] = property(_flat_weights, lambda module, value: None)
    made_by = _overridden_class, (plain_class, attributes)
    own = {"plain_class": plain_class, "attributes": attributes, "made_by": made_by}
    return type(plain_class.__name__, (_Overridden, plain_class), {**names_of_class(plain_class), **own, **members})


def _class_of(plain_class: Any, attributes: frozenset[str]) -> type[nn.Module]:
    return _overridden_class(plain_class, attributes)


def _property(attribute: str) -> property:
    def read(module: nn.Module) -> Any:
        places: tuple[Any, ...] = (module._parameters, module._modules, module.__dict__)
        values = next((place for place in places if attribute in place), None)
        if values is None:
            raise AttributeError(f"{type(module).__name__} has no attribute {attribute!r}")
        own = values[attribute]
        if is_sharded(own) and "_is_fsdp_managed_module" in module.__dict__:
            # fully_shard reads its shards here; during a forward, in which copies are active, they are gathered.
            return own
        overrides = module._modules.get(SLOT)
        copy = None if overrides is None else cast(ParameterCopies, overrides).active(attribute)
        # A copy may have a wider dtype than the model's computation.
        value = own if copy is None else copy.to(own.dtype)
        updates: Any = module._modules.get(attribute + UPDATES)
        return value if updates is None else updates.applied(value)

    def write(module: nn.Module, value: Any) -> None:
        # nn.Module assigns parameters; nn.DataParallel assigns plain tensors to replicas.
        module.__dict__[attribute] = value

    return property(read, write)


def _flat_weights(module: nn.Module) -> list[Tensor]:
    return [getattr(module, name) for name in cast(Any, module)._flat_weights_names]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of the module before any parameter was overridden."""
    kind = type(module)
    return kind.plain_class if issubclass(kind, _Overridden) else kind


def override(module: nn.Module, attribute: str, selection: AdapterSelection) -> ParameterCopies:
    """Let adapters override `attribute`, a parameter of the module; return the child that holds their copies.

    Raises NotImplementedError for a container that calls each of its children, because it would call this child too.
    """
    if SLOT not in module._modules:
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise NotImplementedError(
                f"overrides: {type(module).__name__} must not have parameters of its own, got {attribute!r}; name the "
                "modules inside it"
            )
        module.add_module(SLOT, ParameterCopies(selection))
    kind = type(module)
    known = kind.attributes if issubclass(kind, _Overridden) else frozenset()
    if attribute not in known:
        module.__class__ = _class_of(plain_class(module), known | {attribute})
    return cast(ParameterCopies, module._modules[SLOT])


def restore(module: nn.Module) -> None:
    """Undo `override` if no adapter has a copy any more."""
    if not module._modules.get(SLOT):
        module._modules.pop(SLOT, None)
        if any(name.endswith(UPDATES) for name in module._modules):
            return
        # If another library has extended this class, it stays and reads the module's own parameters.
        if type(module) is not plain_class(module) and "plain_class" in vars(type(module)):
            module.__class__ = plain_class(module)
