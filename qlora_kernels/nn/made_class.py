"""Subclasses that are made at run time, of modules whose behaviour is changed in place, and how they are pickled.

`module.__class__ = made` changes what a module does while its parameters, hooks, names and state dict stay. Such a
class has the name of the class that it extends, so pickle cannot find it by name. It is pickled as the call that makes
it, made classes among the arguments of that call included: changes of several kinds may lie on top of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple


class Recipe(NamedTuple):
    """The call that makes a class; each of `arguments` is an object of its own or a Recipe again."""

    maker: Callable[..., type]
    arguments: tuple[Any, ...]


class MadeClass:
    """Base of all made classes."""

    made_by: ClassVar[tuple[Callable[..., type], tuple[Any, ...]]]
    """The function that made the class, which must be importable by name, and its arguments."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _instance, (recipe_of(type(self)),), state


def names_of_class(base: type) -> dict[str, Any]:
    """What a made class takes over from the class that it extends, so that code which looks at names sees no change."""
    return {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}


def recipe_of(kind: Any) -> Any:
    """A Recipe for a made class, anything else as it is."""
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
