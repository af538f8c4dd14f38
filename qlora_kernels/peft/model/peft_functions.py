"""PEFT's functions for the state dict of one adapter, extended to the models of this package.

accelerate calls them for the sharded checkpoints of Trainer under FSDP2, and TRL to copy adapters. They know only the
names that PEFT gives to parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, wraps
from typing import Any

from ..framework.method import methods_of


@cache
def extend(peft: Any, ours: type) -> None:
    """Replace the functions of the module `peft` by ones that know models of the class `ours` too."""
    get, put = peft.get_peft_model_state_dict, peft.set_peft_model_state_dict

    @wraps(get)
    def get_state_dict(model: Any, state_dict: Any = None, adapter_name: str = "default", **options: Any) -> Any:
        if not issubclass(type(model), ours):
            return get(model, state_dict, adapter_name, **options)
        values = model.state_dict() if state_dict is None else state_dict
        return {key: values[name] for key, name in _names(model, adapter_name).items()}

    @wraps(put)
    def set_state_dict(model: Any, peft_model_state_dict: Any, adapter_name: str = "default", **options: Any) -> Any:
        if not issubclass(type(model), ours):
            return put(model, peft_model_state_dict, adapter_name, **options)
        return _load(model, peft_model_state_dict, adapter_name)

    peft.get_peft_model_state_dict, peft.set_peft_model_state_dict = get_state_dict, set_state_dict


def _load(model: Any, state_dict: Mapping[str, Any], adapter_name: str) -> Any:
    names = _names(model, adapter_name)
    if names.keys() != state_dict.keys():
        wrong = sorted(names.keys() ^ state_dict.keys())
        raise ValueError(
            f"set_peft_model_state_dict: the state dict must hold the parameters of adapter {adapter_name!r} and no "
            f"others, got a difference in {wrong[:5]}; use the dict of get_peft_model_state_dict"
        )
    return model.load_state_dict({names[key]: value for key, value in state_dict.items()}, strict=False)


def _names(model: Any, adapter_name: str) -> dict[str, str]:
    """Return name without the adapter's -> name in the model of each parameter of the adapter."""
    own = {id(p) for method in methods_of(model.injector, adapter_name) for p in method.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in own]
    return {name.replace(f".{adapter_name}.", ".", 1): name for name in names}
