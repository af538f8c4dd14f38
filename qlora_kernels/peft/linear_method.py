"""Public path of LinearMethod, the base class for LoRA-like methods outside this package."""

from .framework.linear_method import LinearMethod
from .layers.delta import Delta

__all__ = ["Delta", "LinearMethod"]
