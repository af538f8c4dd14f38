"""Tap: hooks by which an adapter adds to what a module computes, in the rows that are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .selection import Selection

Update = Callable[[Tensor], Tensor]


class Tap:
    """`update` is read at one place of the model and added at another; each of its methods is one pair of places, and
    returns the handles of the hooks it registered."""

    def __init__(self, selection: Selection, name: str, update: Update) -> None:
        self.selection, self.name, self.update = selection, name, update
        self.x: Tensor | None = None

    def behind(self, module: nn.Module) -> list[RemovableHandle]:
        """The module's output h becomes h + update(h).   h: the output, or the first element of an output tuple."""
        return [module.register_forward_hook(self._behind)]

    def before_norm(self, norm: nn.Module) -> list[RemovableHandle]:
        """The module's input u becomes u + update(norm(u))."""
        return [norm.register_forward_pre_hook(self._before_norm)]

    def beside(self, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
        """The output h of a sublayer becomes h + update(x), x being the sublayer's input.

        Two modules, because a sublayer is not always one: x is the first argument of the one, h the output of the
        other.
        """
        return [first.register_forward_pre_hook(self._remember), last.register_forward_hook(self._beside)]

    def _behind(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._added(output) if self.selection.has(self.name) else output

    def _before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        # forward, not a call: that would come back here.
        return self._added(args, norm.forward(args[0])) if self.selection.has(self.name) else args

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.selection.has(self.name):
            self.x = args[0]

    def _beside(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.selection.has(self.name):
            return output
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError(f"adapter {self.name!r}: the sublayer's input must be its first positional argument")
        return self._added(output, x)

    def _added(self, to: Any, x: Tensor | None = None) -> Any:
        """`to`, a tensor or a tuple that begins with one, h, with update(x) added to h; x: None = h."""
        h, *rest = to if isinstance(to, tuple) else (to,)
        x, rows = h if x is None else x, self.selection.row_index(self.name, h)
        added = self.update(x if rows is None else x[rows]).to(h.dtype)
        h = h + added if rows is None else h.index_add(0, rows, added)
        return (h, *rest) if isinstance(to, tuple) else h
