"""One module in the place of another: what replace_linear and the adapters share."""

from __future__ import annotations

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at the dotted path below root, in the place of the module that is there."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the forward and backward hooks of `source` to `target`, which takes its place in the model.

    The dictionaries themselves change hands, because the handles that remove a hook refer to them.
    """
    for name in _HOOKS:
        mine, theirs = source.__dict__[name], target.__dict__[name]
        source.__dict__[name], target.__dict__[name] = theirs, mine
    source._is_full_backward_hook, target._is_full_backward_hook = None, source._is_full_backward_hook
