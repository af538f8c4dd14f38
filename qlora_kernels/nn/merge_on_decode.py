"""The switch of LoRA layers over NF4 that adds the update to the weight while it is decoded."""

from __future__ import annotations

from torch import nn

from .linear_nf4 import LinearNF4
from .module_tree import check_module


def set_merge_on_decode(model: nn.Module, enabled: bool = True) -> int:
    """Let the LoRA updates of all LinearNF4 in `model` be added to the weight while it is decoded, or apart again.

    y = x W'^T with W' = W + scaling * B A, rounded once to x's dtype, instead of x W^T + scaling * (x A^T) B^T. Forward
    and the gradient of x are then one matrix product each. The NF4 weight itself does not change. docs/format.md
    compares the rounding errors of both. Few rows of x, for which a kernel decodes inside its product, keep the update
    apart, and so does the output head in the fused loss of `fuse_model`.

    model: a module with LinearNF4 inside, before or after adapters are added.   enabled: False restores the default.
    Returns the number of layers. Raises ValueError if there is none, and TypeError if `model` is no module. With the
    switch on, a forward pass raises ValueError where an adapter's dropout is active, and NotImplementedError where rows
    have adapters of their own.
    """
    check_module("set_merge_on_decode", model)
    layers = [module for module in model.modules() if isinstance(module, LinearNF4)]
    if not layers:
        raise ValueError(
            "set_merge_on_decode: model must have at least one LinearNF4, got none; call replace_linear first"
        )
    for layer in layers:
        layer.merge_on_decode = enabled
    return len(layers)
