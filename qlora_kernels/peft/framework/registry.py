"""The registry of methods: `@register_method(Config)` adds a method, which is looked up by type or by PEFT's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.config import PeftConfig

if TYPE_CHECKING:
    from .method import Method

METHODS: dict[type[PeftConfig], type[Method]] = {}

M = TypeVar("M", bound="type[Method]")


def register_method(config: type[PeftConfig]) -> Callable[[M], M]:
    """Class decorator: the decorated Method serves `config`. A type or a peft_type may be registered once.

    Raises ValueError if the peft_type is registered already.
    """

    def register(method: M) -> M:
        if any(known.peft_type == config.peft_type for known in METHODS):
            raise ValueError(
                f"register_method: peft_type must be new, got {config.peft_type!r}, which is registered already; "
                "choose another one"
            )
        METHODS[config] = method
        return method

    return register


def method_for(config: PeftConfig) -> type[Method]:
    """Return the method that serves a configuration; raise TypeError for an unregistered type."""
    try:
        return METHODS[type(config)]
    except KeyError:
        names = sorted(c.__name__ for c in METHODS)
        raise TypeError(f"get_peft_model: config must be one of {names}, got {type(config).__name__}") from None


def config_from_dict(values: dict[str, Any]) -> PeftConfig:
    """Return the configuration in an adapter_config.json.

    Raises ValueError for an unknown peft_type, and the errors of `from_dict` of its configuration.
    """
    for config in METHODS:
        if config.peft_type == values.get("peft_type"):
            return config.from_dict(values)
    known = sorted(c.peft_type for c in METHODS)
    raise ValueError(f"adapter_config.json: peft_type must be one of {known}, got {values.get('peft_type')!r}")
