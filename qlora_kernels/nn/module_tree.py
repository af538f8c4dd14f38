"""Access to modules by dotted name and the replacement of one module by another."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.parallel import DistributedDataParallel


def check_module(op: str, model: nn.Module) -> None:
    """Raise TypeError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}; load it first")


def layers_of(root: nn.Module) -> dict[str, nn.Module]:
    """Return root and every module below it, by all their names, without the modules that adapters have added."""
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if not getattr(module, "holds_adapters", False):
            found[name] = module
            for child_name, child in module._modules.items():
                if child is not None:
                    visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", root)
    return found


WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names of the attribute in which torch.compile, FSDP and activation checkpointing keep the wrapped module."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside torch's transparent wrappers, or the module itself if it is not wrapped."""
    while True:
        names = ("module",) if isinstance(module, (DistributedDataParallel, nn.DataParallel)) else WRAPPED
        inner = next((module._modules[name] for name in names if name in module._modules), None)
        if inner is None:
            return module
        module = inner


def synchronizes(module: nn.Module) -> bool:
    """Whether `module` synchronizes between processes the parameters that existed when it was made."""
    return isinstance(module, DistributedDataParallel) or "_fsdp_wrapped_module" in module._modules or shards(module)


def shards(module: nn.Module) -> bool:
    """Whether fully_shard (FSDP2) was applied; does not import torch.distributed.fsdp, which is slow to import."""
    return hasattr(module, "set_reshard_after_forward")


def names_of(root: nn.Module, module: nn.Module) -> list[str]:
    """Return all dotted names of `module` below root."""
    return [name for name, other in root.named_modules(remove_duplicate=False) if name and other is module]


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at the dotted path below root by `module`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def input_embeddings_of(model: nn.Module) -> nn.Module | None:
    """Return the input embeddings of a transformers model; None if it has none, for which transformers raises."""
    return _from_getter(model, "get_input_embeddings")


def output_embeddings_of(model: nn.Module) -> nn.Module | None:
    """Return the output head of a transformers model, or None if it has none."""
    return _from_getter(model, "get_output_embeddings")


def _from_getter(model: nn.Module, name: str) -> nn.Module | None:
    get: Any = getattr(model, name, None)
    if not callable(get):
        return None
    try:
        found = get()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules runs hooks, its own or those of all modules, or a replaced forward."""
    if (
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    ):
        return True
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Move the forward and backward hooks of `source` to `target`, which replaces it in the model.

    The dictionaries themselves are moved, because the handles that remove a hook refer to them.
    """
    for name in _HOOKS:
        mine, theirs = source.__dict__[name], target.__dict__[name]
        source.__dict__[name], target.__dict__[name] = theirs, mine
    source._is_full_backward_hook, target._is_full_backward_hook = None, source._is_full_backward_hook
