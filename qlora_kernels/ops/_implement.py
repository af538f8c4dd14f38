"""Registration of an op's implementation and of its fake, as decorators that keep the function's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])

DEVICES = ("cpu", "cuda")
"""Both dispatch keys lead to `select`, because Triton and CUDA share one."""


def implement(qualname: str) -> Callable[[Function], Function]:
    """Register the decorated function as `qualname` on every device, and return it unchanged."""

    def register(function: Function) -> Function:
        torch.library.impl(qualname, DEVICES, function)
        return function

    return register


def fake(qualname: str) -> Callable[[Function], Function]:
    """Register the decorated function as the shape-only form of `qualname`, and return it unchanged."""

    def register(function: Function) -> Function:
        torch.library.register_fake(qualname, function)
        return function

    return register
