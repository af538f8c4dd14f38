"""Taps: hooks that let an adapter change the output of a module, for the rows that are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .selection import Selection

Update = Callable[[Tensor], Tensor]


class OutputTap:
    """The module's output h becomes update(h).   h: the output, or the first element of an output tuple."""

    def __init__(self, selection: Selection, name: str, update: Update) -> None:
        self.selection, self.name, self.update = selection, name, update

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        return [module.register_forward_hook(self.hook)]

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.selection.has(self.name):
            return output
        h = output[0] if isinstance(output, tuple) else output
        h = self._updated(h)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _updated(self, h: Tensor) -> Tensor:
        rows = self.selection.row_index(self.name, h)
        return self.update(h) if rows is None else h.index_copy(0, rows, self.update(h[rows]))


class ParallelTap(OutputTap):
    """The output h of a sublayer becomes h + update(x), x being the sublayer's input.

    Two modules, because a sublayer is not always one: x is the first argument of the one, h the output of the other.
    """

    def __init__(self, selection: Selection, name: str, update: Update) -> None:
        super().__init__(selection, name, update)
        self.x: Tensor | None = None

    def attach_between(self, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
        return [first.register_forward_pre_hook(self.remember), *self.attach(last)]

    def remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.selection.has(self.name):
            self.x = args[0]

    def _updated(self, h: Tensor) -> Tensor:
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError(f"adapter {self.name!r}: the sublayer's input must be its first positional argument")
        rows = self.selection.row_index(self.name, h)
        return h + self.update(x) if rows is None else h.index_add(0, rows, self.update(x[rows]))
