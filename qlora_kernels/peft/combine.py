"""A LoRA adapter that is the weighted sum of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import Lora, LoraConfig
from .lora_init import principal_factors

Factors = tuple[Tensor, Tensor, float]


@torch.no_grad()
def weighted_lora(
    parts: Sequence[Lora], weights: Sequence[float], combination_type: str, svd_rank: int | None
) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """The configuration (scaling 1) and (A, B) for each layer of sum_i weights[i] * scaling_i * B_i A_i.

    combination_type, as in PEFT: "cat" is that sum exactly, at rank sum_i r_i; "svd" its best approximation of rank
    svd_rank (default: the largest r_i); "linear" needs equal ranks and combines A and B apart, which is another update:
    (sum_i sqrt(w_i s_i) B_i)(sum_i sqrt(w_i s_i) A_i).
    """
    if combination_type not in _COMBINATIONS:
        raise ValueError(
            f"add_weighted_adapter: combination_type must be one of {sorted(_COMBINATIONS)}, got {combination_type!r}"
        )
    if not parts or len(parts) != len(weights):
        raise ValueError(f"add_weighted_adapter: weights must be one per adapter, got {len(weights)} for {len(parts)}")
    combine = _COMBINATIONS[combination_type]
    combined = {}
    for path in dict.fromkeys(path for part in parts for path in part.deltas):
        present = [
            (lora_A, lora_B, weight * scaling)
            for part, weight in zip(parts, weights, strict=True)
            if path in part.deltas
            for lora_A, lora_B, scaling in [part.deltas[path].lowrank()]
        ]
        combined[path] = combine(path, present, svd_rank)
    ranks = {path: lora_A.shape[0] for path, (lora_A, _) in combined.items()}
    r = max(ranks.values())
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(ranks),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != r},
        alpha_pattern={path: rank for path, rank in ranks.items() if rank != r},
        task_type=parts[0].config.task_type,
    )
    return config, combined


def _cat(path: str, factors: Sequence[Factors], svd_rank: int | None) -> tuple[Tensor, Tensor]:
    return torch.cat([A * w for A, _, w in factors]), torch.cat([B for _, B, _ in factors], dim=1)


def _svd(path: str, factors: Sequence[Factors], svd_rank: int | None) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = _cat(path, factors, None)
    return principal_factors((lora_B @ lora_A).float(), svd_rank or max(A.shape[0] for A, _, _ in factors))


def _linear(path: str, factors: Sequence[Factors], svd_rank: int | None) -> tuple[Tensor, Tensor]:
    if len({A.shape[0] for A, _, _ in factors}) > 1:
        raise ValueError(f"add_weighted_adapter: ranks at {path} must be equal for 'linear'; use 'cat' or 'svd'")
    roots = [abs(w) ** 0.5 for _, _, w in factors]
    signs = [1.0 if w >= 0 else -1.0 for _, _, w in factors]
    lora_A = torch.stack([A * root for (A, _, _), root in zip(factors, roots, strict=True)]).sum(0)
    signed = [B * root * sign for (_, B, _), root, sign in zip(factors, roots, signs, strict=True)]
    return lora_A, torch.stack(signed).sum(0)


_COMBINATIONS = {"cat": _cat, "svd": _svd, "linear": _linear}
