"""Overrides: an adapter's own copies of some of the model's parameters, in place while the adapter is active."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn

from .base_layer import is_quantized
from .host import Host
from .tree import Tree


class Overrides:
    """The mechanism under full fine-tuning, BitFit, trained LayerNorms, bias options and modules_to_save.

    The copies are nn.Parameters of the adapter's tree, at the path of the original; while applied they stand in the
    model's modules in place of the originals. Disabling an adapter puts the same objects back: the base exactly.
    """

    def __init__(self, host: Host, tree: Tree) -> None:
        self.host = host
        self.tree = tree
        self.places: dict[str, tuple[nn.Module, str]] = {}  # path -> (owning module, attribute)
        self.copies: dict[str, nn.Parameter] = {}
        self.originals: dict[str, nn.Parameter] = {}
        self.applied = False

    def add(self, path: str, *, stored_as: str | None = None) -> None:
        """Copies the parameter at `path`; one copy for all the paths of a tied one.

        stored_as: where the copy lies in the tree, if not at the same path.
        """
        if path in self.copies:
            return
        owner, _, attribute = path.rpartition(".")
        module = self.host.module(owner)
        original = cast(nn.Parameter, module._parameters[attribute])
        tied = next((self.copies[p] for p, other in self.originals.items() if other is original), None)
        self.places[path], self.originals[path] = (module, attribute), original
        self.copies[path] = tied if tied is not None else nn.Parameter(original.detach().clone())
        if tied is None:
            self.tree.put(stored_as or path, self.copies[path])

    def add_modules(self, suffixes: Iterable[str]) -> None:
        """Every parameter of the modules whose name is, or ends with, one of the suffixes.

        Raises ValueError if such a module has quantized weights: those cannot be trained.
        """
        wanted = [f".{suffix}" for suffix in suffixes]
        for name, module in self.host.modules().items():
            if any(f".{name}".endswith(suffix) for suffix in wanted):
                if any(is_quantized(m) for m in module.modules()):
                    raise ValueError(f"modules_to_save: {name} must not be quantized; name it in replace_linear's skip")
                for path, _ in module.named_parameters():
                    self.add(self.host.canonical(f"{name}.{path}"))

    def set_applied(self, applied: bool) -> None:
        applied = applied and bool(self.copies)
        if applied != self.applied:
            for path, parameter in (self.copies if applied else self.originals).items():
                module, attribute = self.places[path]
                module._parameters[attribute] = parameter
            self.applied = applied

    def keep(self) -> None:
        """Makes the copies the model's own for good."""
        self.set_applied(True)
        self.copies, self.originals = {}, {}
