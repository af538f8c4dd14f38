"""AdapterHook: hooks by which an adapter adds to what a module of the model computes, in the rows that are its own."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.adapter_selection import AdapterSelection, PerThread
from ..core.adapter_tree import Place


class AdapterHook:
    """Adds update(x), x being read at one place of the model and the sum made at another.

    Each of the methods that take modules is one such pair of places, and returns the handles of the hooks that it
    registered. The adapter's module is looked up at `place` below the module where the sum is made: that is the module
    that the hook is called with, so a replica of it computes with the replica of the adapter.
    """

    def __init__(self, selection: AdapterSelection, name: str, place: Place) -> None:
        self.selection, self.name, self.place = selection, name, place
        self.x = PerThread()

    def update(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the update that is added at `module`."""
        entries = cast(nn.ModuleDict, module._modules[self.place.slot])
        return entries[self.place.key](x)  # type: ignore[no-any-return]

    def after(self, module: nn.Module) -> list[RemovableHandle]:
        """The module's output h becomes h + update(h).   h: the output, or the first element of an output tuple."""
        return [module.register_forward_hook(self._after)]

    def before_norm(self, norm: nn.Module) -> list[RemovableHandle]:
        """The module's input u becomes u + update(norm(u))."""
        return [norm.register_forward_pre_hook(self._before_norm)]

    def parallel(self, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
        """The output h of a sublayer becomes h + update(x), x being the sublayer's input.

        Two modules, because a sublayer is not always one: x is the first argument of the one, h the output of the
        other.
        """
        return [first.register_forward_pre_hook(self._remember), last.register_forward_hook(self._parallel)]

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._added(module, output) if self.selection.has(self.name) else output

    def _before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        # forward, not a call: that would come back here.
        return self._added(norm, args, norm.forward(args[0])) if self.selection.has(self.name) else args

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.selection.has(self.name):
            self.x.put(args[0] if args else None)

    def _parallel(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.selection.has(self.name):
            return output
        x = self.x.take()
        if x is None:
            raise RuntimeError(f"adapter {self.name!r}: the sublayer's input must be its first positional argument")
        return self._added(module, output, x)

    def _added(self, module: nn.Module, to: Any, x: Tensor | None = None) -> Any:
        """`to`, a tensor or a tuple that begins with one, h, with update(x) added to h; x: None = h."""
        h, *rest = to if isinstance(to, tuple) else (to,)
        x, rows = h if x is None else x, self.selection.row_index(self.name, h)
        added = self.update(module, x if rows is None else x[rows]).to(h.dtype)
        h = h + added if rows is None else h.index_add(0, rows, added)
        return (h, *rest) if isinstance(to, tuple) else h
