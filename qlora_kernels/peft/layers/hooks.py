"""AdapterHook: hooks by which an adapter changes the input or output of a module, in the rows that use the adapter."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.adapter_selection import AdapterSelection, PerThread
from ..core.adapter_tree import Place


class AdapterHook:
    """Adds update(x), where x is read at one place of the model and update(x) is added at another.

    Each method that takes modules registers the hooks for one such pair of places, and returns their handles. The
    adapter's module is looked up at `place` below the module at which the update is added. A hook receives this module
    as an argument, so that a replica uses its replica of the adapter.
    """

    def __init__(self, selection: AdapterSelection, name: str, place: Place) -> None:
        self.selection, self.name, self.place = selection, name, place
        self.x: PerThread[Tensor | None] = PerThread()

    def update(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the update that is added at `module`."""
        entries = cast(nn.ModuleDict, module._modules[self.place.slot])
        return entries[self.place.key](x)  # type: ignore[no-any-return]

    def after(self, module: nn.Module) -> list[RemovableHandle]:
        """Change the module's output h to h + update(h). h: the output, or the first element of an output tuple."""
        return [module.register_forward_hook(self._after)]

    def before_norm(self, norm: nn.Module) -> list[RemovableHandle]:
        """Change the module's input u to u + update(norm(u))."""
        return [norm.register_forward_pre_hook(self._before_norm)]

    def parallel(self, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
        """Change the output h of a sublayer to h + update(x), where x is the sublayer's input.

        A sublayer may consist of several modules: x is the first argument of the first one, h the output of the last.
        """
        return [first.register_forward_pre_hook(self._remember), last.register_forward_hook(self._parallel)]

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._added(module, output) if self.selection.has(self.name) else output

    def _before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        # forward() and not a call, which would run this hook again
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
        """Return `to`, a tensor h or a tuple that begins with h, with update(x) added to h; x: None = h."""
        h, *rest = to if isinstance(to, tuple) else (to,)
        x, rows = h if x is None else x, self.selection.row_index(self.name, h)
        added = self.update(module, x if rows is None else x[rows]).to(h.dtype)
        h = h + added if rows is None else h.index_add(0, rows, added)
        return (h, *rest) if isinstance(to, tuple) else h
