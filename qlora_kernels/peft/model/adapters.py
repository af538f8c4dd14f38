"""Adding, activating and removing the adapters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn, cast

from ..core.adapter_selection import BASE
from ..core.adapter_tree import AdapterModules
from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.method import Method, methods_of
from ..framework.registry import method_for
from .huggingface import config_of_peft, is_of_peft

Configs = PeftConfig | Sequence[PeftConfig]


def as_configs(configs: Configs) -> list[PeftConfig]:
    """Return a list of configurations from one configuration or several; those of Hugging Face PEFT are converted.

    Raises TypeError for other objects, ValueError for none, and NotImplementedError for options of PEFT that the method
    does not have.
    """
    if isinstance(configs, PeftConfig) or is_of_peft(configs):
        configs = [cast(PeftConfig, configs)]
    if isinstance(configs, (str, Mapping)) or not isinstance(configs, Iterable):
        got = f"the class {configs.__name__}" if isinstance(configs, type) else type(configs).__name__
        raise TypeError(
            f"get_peft_model: peft_config must be a configuration such as LoraConfig(r=8), or a list of them, got {got}"
        )
    listed = [config_of_peft(config) if is_of_peft(config) else config for config in configs]
    if not listed:
        raise ValueError("get_peft_model: peft_config must hold at least one configuration, got none")
    return listed


def add(injector: Injector, name: str, configs: Configs, *, training: bool) -> None:
    """Add an adapter, which is neither active nor trained; an error leaves the model unchanged.

    Raises ValueError for a name that is taken or cannot be the name of a module, TypeError for one that is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"add_adapter: adapter_name must be a string, got {type(name).__name__}")
    if name in injector.adapters or name == BASE or "." in name or not name:
        raise ValueError(f"add_adapter: adapter_name must be new, not empty and without dots, got {name!r}")
    if hasattr(AdapterModules, name):
        raise ValueError(f"add_adapter: adapter_name must be no attribute of nn.ModuleDict, got {name!r}; use another")
    methods: list[Method] = []
    injector.adapters[name] = methods
    try:
        with injector.selection.disabled():
            for config in as_configs(configs):
                method = method_for(config)(config, injector, name)
                methods.append(method)
                method.attach()
    except BaseException:
        for method in reversed(methods):
            method.detach()
        del injector.adapters[name]
        raise
    for method in methods_of(injector, name):
        method.set_trainable(False)
        method.tree.train(training)


def remove(injector: Injector, name: str) -> None:
    """Remove the adapter from the model and from the active ones."""
    for method in reversed(methods_of(injector, name)):
        method.detach()
    del injector.adapters[name]
    injector.selection.active = tuple(other for other in injector.selection.active if other != name)


def activate(injector: Injector, names: Sequence[str], *, trainable: bool) -> None:
    """Make exactly these adapters active, and train exactly them or none.

    Raises ValueError for unknown names, for adapters that replace the same parameters, and for an adapter together with
    another one that uses it.
    """
    for name in names:
        methods_of(injector, name)
    check_replaced(injector, "set_adapter", names)
    if both := {part for name in names for part in names_of_parts(injector, name)} & set(names):
        raise ValueError(f"set_adapter: {sorted(both)} must not be active beside the adapter made of them")
    injector.selection.active = tuple(names)
    for name in injector.adapters:
        for method in methods_of(injector, name):
            method.set_trainable(name in names and trainable)
            method.watch_training()


def names_of_parts(injector: Injector, name: str) -> set[str]:
    """Return the names of the other adapters that adapter `name` uses."""
    return {part for method in methods_of(injector, name) for part in method.needs}


def replaced_paths(injector: Injector, name: str) -> list[str]:
    """Return the paths of the model's parameters that adapter `name` replaces while it is active."""
    return [path for method in methods_of(injector, name) for path in method.overrides.paths]


def check_replaced(injector: Injector, op: str, names: Sequence[str]) -> None:
    """Raise ValueError if two of the adapters replace one parameter.   op: begins the message."""
    replaced = [path for name in names for path in replaced_paths(injector, name)]
    if twice := {path for path in replaced if replaced.count(path) > 1}:
        raise ValueError(f"{op}: adapters {list(names)} must not replace the same parameters, got {min(twice)}")


def is_trained(injector: Injector, name: str) -> bool:
    """Whether some parameter of adapter `name` requires a gradient."""
    return any(p.requires_grad for method in methods_of(injector, name) for p in method.parameters())


class _ConfigsByName(dict[str, "PeftConfig | list[PeftConfig]"]):
    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(
            f"peft_config: name must be an adapter of this model, one of {list(self)}, got {name!r}; some trainers, "
            "TRL's DPOTrainer among them, need an adapter named 'default', the adapter_name that get_peft_model uses"
        )


def configs_of(injector: Injector) -> dict[str, PeftConfig | list[PeftConfig]]:
    """Return each adapter's configuration, or a list of configurations if it combines several methods.

    A look-up of another name raises KeyError with the names.
    """
    configs = {name: [method.config for method in methods] for name, methods in injector.adapters.items()}
    return _ConfigsByName((name, parts[0] if len(parts) == 1 else parts) for name, parts in configs.items())
