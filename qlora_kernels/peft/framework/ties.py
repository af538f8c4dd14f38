"""Tied parameters: finding them, and keeping a transformers model's configuration consistent with them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import nn


def paths_of_tied(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Return, for each parameter with several paths, each path -> all paths of the parameter.

    modules: Injector.modules(aliases=True).
    """
    groups: dict[int, list[str]] = {}
    for owner, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                groups.setdefault(id(parameter), []).append(f"{owner}.{leaf}" if owner else leaf)
    return {path: paths for paths in groups.values() if len(paths) > 1 for path in paths}


def declare_ties(model: nn.Module) -> None:
    """Update the configuration of a transformers model, and its list of tied weights, to the present ties.

    If parameters that the configuration ties now differ (a head was trained in full, or merged), tie_word_embeddings
    becomes False. The flag applies to all ties of the model, so parameters that are still tied are copied; otherwise a
    saved model would lack them. T5 and related models, whose output is scaled depending on the flag, keep it, with a
    warning: transformers does not tie parameters that a folder holds twice with different values.
    """
    keys: Any = getattr(model, "all_tied_weights_keys", None) or {}
    broken = [target for target, source in keys.items() if not _same(model, target, source)]
    if not broken:
        return
    if _output_depends_on_flag(model):
        for target in broken:
            del keys[target]
        warnings.warn(
            f"merge: {broken[0]} is tied to other weights no more, while tie_word_embeddings, on which the output of "
            f"a {type(model).__name__} depends, stays True; calling tie_weights() would undo the merge",
            stacklevel=3,
        )
        return
    for target in keys.keys() - set(broken):
        owner, _, leaf = target.rpartition(".")
        module, own = model.get_submodule(owner), model.get_parameter(target)
        module.register_parameter(leaf, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))
    for part in model.modules():
        part_keys: Any = getattr(part, "all_tied_weights_keys", None)
        if isinstance(part_keys, dict):
            part_keys.clear()
        config: Any = getattr(part, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _output_depends_on_flag(model: nn.Module) -> bool:
    """Return whether the model's forward, or a field that it reads, depends on tie_word_embeddings."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return False
    read = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    if read.tie_word_embeddings or any(
        value != getattr(config, name, value) for name, value in vars(read).items() if name.startswith("scale_")
    ):
        return True
    try:
        return "tie_word_embeddings" in inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        return True


def _same(model: nn.Module, target: str, source: str) -> bool:
    return _parameter(model, target) is _parameter(model, source)


def _parameter(model: nn.Module, path: str) -> object:
    owner, _, leaf = path.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    # A quantized head has no parameter of that name and is not tied.
    return module._parameters.get(leaf, module)
