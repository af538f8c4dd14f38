"""Public path of what a method outside of this package is built from; docs/tutorials/add-a-method.md shows one."""

from .framework.method import Method, PreparedCall
from .framework.registry import register_method

__all__ = ["Method", "PreparedCall", "register_method"]
