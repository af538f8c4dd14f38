"""The operands of projections that are linears over NF4, with LoRA or without, for nodes that compute several."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.lora_projection import Projection
from ..ops.operands import LoRA
from .linear_nf4 import LinearNF4
from .module_tree import has_hooks


def plain_projections(x: Tensor, *modules: nn.Module) -> list[Projection] | None:
    """Return the operands of the modules, or None if one of them has to be called.

    A module has to be called if it has hooks, is not a LinearNF4 or an adapted one, computes in another dtype than that
    of x, has an active update that is not of low rank, or adds its update to the decoded weight.
    """
    if torch.compiler.is_compiling() or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return None
    projections = []
    for module in modules:
        projection = _plain_projection(module, x.dtype)
        if projection is None:
            return None
        projections.append(projection)
    return projections


def _plain_projection(module: nn.Module, dtype: torch.dtype) -> Projection | None:
    if has_hooks(module):
        return None
    base, update, dropout_p = module, None, 0.0
    if hasattr(module, "low_rank_form"):  # an adapted layer of qlora_kernels.peft
        form = cast(Any, module).low_rank_form()
        if form is None:
            return None
        base, update, dropout_p = form
        if has_hooks(base):
            return None
    if type(base) is not LinearNF4 or base.compute_dtype not in (None, dtype) or base.merge_on_decode:
        return None
    if update is None:
        return Projection(base._operand, base.bias, None)
    lora_A, lora_B, scaling = update
    return Projection(base._operand, base.bias, LoRA(lora_A, lora_B, None, scaling, dropout_p))
