"""Low-rank updates of a linear layer, combined: y = base(x) + sum_i scaling_i * B_i A_i dropout(x)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.module_tree import has_hooks

LoraFactors = tuple[Tensor, Tensor, float]
"""(lora_A [r, K], lora_B [N, r], scaling)."""


def forward_lowrank(
    base: nn.Module, x: Tensor, updates: Sequence[LoraFactors], *, dropout_p: float, owner: Tensor | None = None
) -> Tensor:
    """Return base(x) plus the updates, by one fused call if the base supports it and has no hooks.

    x [B, ..., K]. owner: int64 [B], the index of the update of each row, -1 for none; None = every row gets all.
    """
    if has_hooks(base):  # they run, and may change y, only if the layer is called
        return add_lowrank(x, base(x), updates, dropout_p=dropout_p, owner=owner)
    if owner is None and hasattr(base, "forward_lora"):
        lora_A, lora_B, scaling = updates[0] if len(updates) == 1 else concatenated(updates)
        return base.forward_lora(x, lora_A, lora_B, scaling, dropout_p)  # type: ignore[no-any-return, operator]
    if owner is not None and hasattr(base, "forward_multi_lora"):
        tokens = x[..., 0].numel() // max(x.shape[0], 1)
        each = owner.repeat_interleave(tokens)
        return base.forward_multi_lora(x, *_stacked(updates), each, dropout_p)  # type: ignore[no-any-return, operator]
    return add_lowrank(x, base(x), updates, dropout_p=dropout_p, owner=owner)


def add_lowrank(
    x: Tensor, y: Tensor, updates: Sequence[LoraFactors], *, dropout_p: float, owner: Tensor | None = None
) -> Tensor:
    """Return y plus the updates, by matmuls in the factors' dtype, rounded once to y's dtype.

    One pair of matmuls computes all updates; with owners the intermediate result [B, ..., sum of r] is masked by row.
    """
    lora_A, lora_B, scaling = concatenated(updates)
    s = F.linear(F.dropout(x.to(lora_A.dtype), dropout_p), lora_A)
    if owner is not None:
        ranks = torch.tensor([A.shape[0] for A, _, _ in updates], device=x.device)
        columns = torch.arange(len(updates), device=x.device).repeat_interleave(ranks)
        mask = owner[:, None] == columns
        s = s * mask.view(mask.shape[0], *(1,) * (s.dim() - 2), mask.shape[1])
    return (y + F.linear(s, lora_B) * scaling).to(y.dtype)


def concatenated(updates: Sequence[LoraFactors]) -> LoraFactors:
    """Return the sum of the updates as one update of rank sum_i r_i."""
    if len(updates) == 1:
        return updates[0]
    lora_A = torch.cat([A for A, _, _ in updates])
    return lora_A, torch.cat([B * scaling for _, B, scaling in updates], dim=1), 1.0


def _stacked(updates: Sequence[LoraFactors]) -> tuple[Tensor, Tensor, Tensor]:
    """Return A [E, r, K] and B [E, N, r], with ranks padded by zeros to the largest, and scalings fp32 [E]."""
    r = max(A.shape[0] for A, _, _ in updates)
    lora_A = torch.stack([F.pad(A, (0, 0, 0, r - A.shape[0])) for A, _, _ in updates])
    lora_B = torch.stack([F.pad(B, (0, r - B.shape[1])) for _, B, _ in updates])
    return lora_A, lora_B, torch.tensor([scaling for *_, scaling in updates], device=lora_A.device)
