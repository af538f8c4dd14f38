"""Subclasses made at run time, which change the behaviour of modules in place, and their pickling.

`module.__class__ = made` changes the methods of a module; its parameters, hooks, names and state dict do not change. A
made class has the name of the class it extends, so that pickle cannot find it by name. It is pickled as the call that
makes it. The arguments of that call may be made classes themselves, so that several changes can be stacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple


class Recipe(NamedTuple):
    """The call that makes a class; each of `arguments` is an object or another Recipe."""

    maker: Callable[..., type]
    arguments: tuple[Any, ...]


class MadeClass:
    """Base of all made classes."""

    made_by: ClassVar[tuple[Callable[..., type], tuple[Any, ...]]]
    """The importable function that made the class, and its arguments."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _instance, (recipe_of(type(self)),), state


def names_of_class(base: type) -> dict[str, Any]:
    """Return the attributes by which a made class looks like the class it extends: name, module and docstring."""
    return {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}


def recipe_of(kind: Any) -> Any:
    """Return the Recipe of a made class; return any other object unchanged."""
    if not isinstance(kind, type) or (made := vars(kind).get("made_by")) is None:
        return kind
    maker, arguments = made
    return Recipe(maker, tuple(recipe_of(argument) for argument in arguments))


def _class_of(recipe: Any) -> Any:
    if not isinstance(recipe, Recipe):
        return recipe
    return recipe.maker(*(_class_of(argument) for argument in recipe.arguments))


def _instance(recipe: Any) -> Any:
    kind = _class_of(recipe)
    return kind.__new__(kind)
