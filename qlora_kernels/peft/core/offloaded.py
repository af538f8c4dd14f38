"""Reading the weights of modules that are not called.

accelerate keeps offloaded weights elsewhere and loads them when their module is called. Weights that an adapter reads
without a call, such as the factors of a fused op, are loaded here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def weight_of(module: nn.Module, name: str) -> Tensor:
    """Return the parameter `name` of the module, or accelerate's copy if it was offloaded."""
    tensor: Tensor = getattr(module, name)
    if tensor is not None and tensor.is_meta:
        hook: Any = getattr(module, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is not None:
            kept: Tensor = hook.weights_map[name].to(hook.execution_device)
            return kept
    return tensor
