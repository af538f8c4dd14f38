"""Composite: a method that consists of other methods, saved as one adapter in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.config import PeftConfig
from .injector import Injector
from .method import Method


class Composite(Method):
    """A method made of `components`, name -> method. Each component runs as a method; in files its tensors are under
    its name.
    """

    def __init__(self, config: PeftConfig, injector: Injector, name: str) -> None:
        self.components: dict[str, Method] = {}
        super().__init__(config, injector, name)

    def add(self, components: Mapping[str, Method]) -> None:
        """Add components; attach() attaches them in this order."""
        self.components.update(components)

    @property
    def parts(self) -> list[Method]:
        return list(self.components.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, part in self.components.items():
            yield from ((f"{name}:{path}", parameter) for path, parameter in part.named_parameters())
        yield from super().named_parameters()

    def attach(self) -> None:
        super().attach()
        for part in self.parts:
            part.attach()

    def detach(self) -> None:
        for part in reversed(self.parts):
            part.detach()
        super().detach()

    def tensors(self) -> dict[str, Tensor]:
        inner = {f"{n}:{key}": value for n, part in self.components.items() for key, value in part.tensors().items()}
        return {**super().tensors(), **inner}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        rest = dict(tensors)
        for name, part in self.components.items():
            part.load_tensors(_taken(rest, f"{name}:"))
        super().load_tensors(rest)

    def extras(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {}
        for name, part in self.components.items():
            tensors.update({f"{name}:{key}": value for key, value in part.extras()[1].items()})
        return {}, tensors

    def load_extras(self, values: dict[str, Any], tensors: dict[str, Tensor], *, is_trainable: bool) -> None:
        rest = dict(tensors)
        for name, part in self.components.items():
            part.load_extras({}, _taken(rest, f"{name}:"), is_trainable=is_trainable)

    def training_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        states = {name: part.training_state() for name, part in self.components.items()}
        tensors = {f"{name}:{key}": tensor for name, (_, own) in states.items() for key, tensor in own.items()}
        return {name: values for name, (values, _) in states.items()}, tensors

    def load_training_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        rest = dict(tensors)
        for name, part in self.components.items():
            part.load_training_state(values.get(name, {}), _taken(rest, f"{name}:"))


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove and return the entries below a prefix, without it."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
