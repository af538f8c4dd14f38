"""Public path of LinearMethod, the base of LoRA-like methods outside of this package."""

from .framework.linear_method import LinearMethod
from .layers.adapted_linear import Delta

__all__ = ["Delta", "LinearMethod"]
