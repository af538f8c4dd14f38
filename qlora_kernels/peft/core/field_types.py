"""Check of a configuration's fields against their annotations.

Configurations also come from files and command lines, where use_rslora="false" would count as true and r=1.5 as a rank.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def check_field_types(config: Any) -> None:
    """Raise ValueError where a field of a dataclass holds a value that its annotation does not admit.

    Lists may be any collection but a string. An integer is admitted as a float, a bool is not admitted as a number, and
    inf and NaN are not admitted. For a Literal, only the type of the value is checked; the class itself checks the
    value.
    """
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if not admits(hint, value):
            wanted = str(hint) if get_origin(hint) else hint.__name__
            wanted = wanted.replace("typing.", "").replace("collections.abc.", "")
            raise ValueError(f"{type(config).__name__}: {name} must be {wanted}, got {str(value)[:60]!r}")


def field_types(cls: Any) -> dict[str, Any]:
    """Field name -> annotation, of a dataclass type."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def admits(hint: Any, value: Any) -> bool:
    """Whether `value` is of the type `hint`, elements of collections included."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(admits(argument, value) for argument in arguments)
    if origin is Literal:
        return any(admits(type(argument), value) for argument in arguments)
    if origin is dict:
        keys, values = arguments
        return isinstance(value, Mapping) and all(admits(keys, k) and admits(values, v) for k, v in value.items())
    if origin is not None:  # list, tuple[X, ...], set, Collection
        is_collection = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return is_collection and all(admits(arguments[0], element) for element in value)
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        return number and (hint is int or _is_finite(value))
    return isinstance(value, hint)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
