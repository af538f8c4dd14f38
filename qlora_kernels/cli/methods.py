"""Configurations of PEFT methods from the command line: every registered method, with its fields set by --set."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ..peft import METHODS as REGISTERED
from ..peft import PeftConfig

_ELSEWHERE = {
    "full_ft",  # needs a dense model
    "adapter_fusion",  # needs trained adapters
    "trainable_tokens",  # with LoRA: --set trainable_token_indices=[1,2]
}
_OTHER_MEANING = {"oft": {"r"}}
"""Fields that have the name of an option but another meaning: OFT's r is a number of blocks."""
METHODS = {config.peft_type.lower(): config for config in REGISTERED if config.peft_type.lower() not in _ELSEWHERE}
"""Name on the command line -> configuration."""


def adapter_config(method: str, options: Mapping[str, Any], assignments: Mapping[str, Any]) -> PeftConfig:
    """Return the configuration of `method`.

    options: values by field name; those without a field of the method are ignored.
    assignments: values by field name. Raises ValueError, with the nearest field, for a name that is not a field.
    """
    config = METHODS[method]
    fields = [field.name for field in dataclasses.fields(config)]
    for name in assignments:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4) or fields
            raise ValueError(f"--set: {method} has no field {name!r}; did you mean one of {near}?")
    known = set(fields) - _OTHER_MEANING.get(method, set())
    taken = {name: value for name, value in options.items() if name in known}
    return config(**{**taken, **assignments})
