"""The operands of projections that are LoRA linears over NF4 and nothing else, for nodes that compute several."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.lora_projection import Projection
from ..ops.operands import LoRA
from .fused_module import all_are_watched, is_watched
from .linear_nf4 import LinearNF4


def plain_projections(x: Tensor, *modules: nn.Module) -> list[Projection] | None:
    """Return the operands of the modules, or None if one of them has to be called.

    A module has to be called if it has hooks, is not an adapted LinearNF4, computes in another dtype than that of x, or
    has an active update that is not a low-rank one without dropout, or adds its update to the decoded weight.
    """
    if torch.compiler.is_compiling() or x.is_meta or torch.is_autocast_enabled(x.device.type) or all_are_watched():
        return None
    projections = []
    for module in modules:
        projection = _plain_projection(module, x.dtype)
        if projection is None:
            return None
        projections.append(projection)
    return projections


def _plain_projection(module: nn.Module, dtype: torch.dtype) -> Projection | None:
    if not hasattr(module, "plain_form") or is_watched(module):
        return None
    form = cast(Any, module).plain_form()
    if form is None or form[1] is None:
        return None
    base, (lora_A, lora_B, scaling) = form
    if type(base) is not LinearNF4 or is_watched(base) or base.compute_dtype not in (None, dtype):
        return None
    if base.merge_on_decode:
        return None
    return Projection(base._operand, base.bias, LoRA(lora_A, lora_B, None, scaling, 0.0))
