"""Weights of modules that are read without a call of the module.

accelerate keeps offloaded weights elsewhere and brings them when their module is called. What an adapter reads itself,
such as the factors that go into one fused op, is brought here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The parameter `name` of the module; from where accelerate keeps it if the module itself has none."""
    tensor: Tensor = getattr(module, name)
    if tensor is not None and tensor.is_meta:
        hook: Any = getattr(module, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is not None:
            kept: Tensor = hook.weights_map[name].to(hook.execution_device)
            return kept
    return tensor


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules does more than its forward says."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False
