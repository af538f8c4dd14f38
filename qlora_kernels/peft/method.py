"""Public path of the base classes for methods outside this package; docs/tutorials/add-a-method.md has an example."""

from .framework.method import Method, PreparedCall
from .framework.registry import register_method

__all__ = ["Method", "PreparedCall", "register_method"]
