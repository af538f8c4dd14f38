"""Composite: a method made of others, one adapter in one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .config import PeftConfig
from .host import Host
from .method import Method


class Composite(Method):
    """`components`: name -> method. Each runs as a method of its own; its tensors lie under its name in the file."""

    def __init__(self, config: PeftConfig, host: Host, name: str) -> None:
        super().__init__(config, host, name)
        self.components = nn.ModuleDict()

    def add(self, components: Mapping[str, Method]) -> None:
        self.components.update(components)

    @property
    def parts(self) -> list[Method]:
        return [component for component in self.components.values() if isinstance(component, Method)]

    def _named(self) -> dict[str, Method]:
        return dict(zip(self.components, self.parts, strict=True))

    def detach(self) -> None:
        super().detach()
        for part in self.parts:
            part.detach()

    def tensors(self) -> dict[str, Tensor]:
        inner = {f"{n}:{key}": value for n, part in self._named().items() for key, value in part.tensors().items()}
        return {**super().tensors(), **inner}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        rest = dict(tensors)
        for name, part in self._named().items():
            part.load_tensors(_taken(rest, f"{name}:"))
        super().load_tensors(rest)

    def extras(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {}
        for name, part in self._named().items():
            tensors.update({f"{name}:{key}": value for key, value in part.extras()[1].items()})
        return {}, tensors

    def load_extras(self, values: dict[str, Any], tensors: dict[str, Tensor], *, is_trainable: bool) -> None:
        rest = dict(tensors)
        for name, part in self._named().items():
            part.load_extras({}, _taken(rest, f"{name}:"), is_trainable=is_trainable)

    def training_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        states = {name: part.training_state() for name, part in self._named().items()}
        tensors = {f"{name}:{key}": tensor for name, (_, own) in states.items() for key, tensor in own.items()}
        return {name: values for name, (values, _) in states.items()}, tensors

    def load_training_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        rest = dict(tensors)
        for name, part in self._named().items():
            part.load_training_state(values.get(name, {}), _taken(rest, f"{name}:"))


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes and returns the entries below a prefix, without it."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
