"""Combination of LoRA adapters into one: the weighted sum of the updates, or sparser variants of it.

Source: TIES (arXiv:2306.01708), DARE (arXiv:2311.03099). Names and combined tensors: PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...nn.match import contained_in
from ..framework.injector import Injector
from ..framework.method import methods_of
from ..methods.lora import Lora
from ..methods.lora_config import LoraConfig
from ..methods.lora_init import principal_factors

Factors = tuple[Tensor, Tensor, float]
"""(A_i, B_i, s_i) of one adapter at one layer."""


@dataclass(frozen=True)
class _Arithmetic:
    """The operations that combine several tensors into one.

    prune: keeps a fraction `density` of each tensor's entries, the largest ("magnitude") or random ones scaled by 1 /
    density.
    elect: whether a sign is elected for each entry, which is then the mean of the tensors with that sign; otherwise
    entries are summed.
    """

    prune: Literal["magnitude", "random"] | None = None
    elect: bool = False


_ARITHMETICS = {
    "linear": _Arithmetic(),
    "magnitude_prune": _Arithmetic("magnitude"),
    "ties": _Arithmetic("magnitude", elect=True),
    "dare_linear": _Arithmetic("random"),
    "dare_ties": _Arithmetic("random", elect=True),
}
_SVD = {"svd": "linear"} | {f"{name}_svd": name for name in _ARITHMETICS if name != "linear"}


@dataclass(frozen=True)
class Combination:
    """A combination of updates. kind, as in PEFT: "cat" is exactly sum_i w_i s_i B_i A_i (s_i: scalings), with rank
    sum_i r_i.

    "svd" is the best approximation of this sum with rank svd_rank (default: the largest r_i). "linear" needs equal
    ranks and combines A and B separately, which gives another update: (sum_i sqrt(w_i s_i) B_i)(sum_i sqrt(w_i s_i)
    A_i). "magnitude_prune", "ties", "dare_linear" and "dare_ties" replace the sum of "linear" by a sparser one, and
    with the suffix "_svd" that of "svd". They keep a fraction `density` of the entries. ties elects signs by the
    "total" of the entries or by the "frequency" of their signs.
    Raises ValueError, naming the argument of add_weighted_adapter, for an unknown kind or sign method and for a density
    outside (0, 1].
    """

    kind: str
    svd_rank: int | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        known = ["cat", *_ARITHMETICS, *_SVD]
        if self.kind not in known:
            raise ValueError(f"add_weighted_adapter: combination_type must be one of {known}, got {self.kind!r}")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(
                "add_weighted_adapter: majority_sign_method must be 'total' or 'frequency', "
                f"got {self.majority_sign_method!r}"
            )
        if self.kind != "cat" and self.arithmetic.prune and not 0 < (self.density or 0.0) <= 1:
            raise ValueError(
                f"add_weighted_adapter: density must lie in (0, 1] for {self.kind!r}, got {self.density!r}"
            )

    @property
    def arithmetic(self) -> _Arithmetic:
        """The operations of this type of combination."""
        return _ARITHMETICS[_SVD.get(self.kind, self.kind)]

    def factors(self, path: str, parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return (A, B) of the layer at `path`.

        Raises ValueError for adapters of different ranks, which only "cat" and the kinds with an SVD can combine.
        """
        scaled = [w * s for w, (_, _, s) in zip(weights, parts, strict=True)]
        ranks = [A.shape[0] for A, _, _ in parts]
        all_A, all_B = [A for A, _, _ in parts], [B for _, B, _ in parts]
        if self.kind == "cat":
            return torch.cat([A * w for A, w in zip(all_A, scaled, strict=True)]), torch.cat(all_B, dim=1)
        if self.kind in _SVD:
            update = self.sum([s * (B.float() @ A.float()) for A, B, s in parts], weights)
            return principal_factors(update, self.svd_rank or max(ranks))
        if len(set(ranks)) > 1:
            raise ValueError(
                f"add_weighted_adapter: ranks at {path} must be equal for {self.kind!r}, got {ranks}; use cat or svd"
            )
        roots = [abs(w) ** 0.5 for w in scaled]
        signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
        return self.sum(all_A, signed), self.sum(all_B, roots)

    def sum(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the combination of tensors of one shape, with one weight for each."""
        pruned = torch.stack([self._pruned(tensor) for tensor in tensors])
        weight = torch.tensor(weights, dtype=pruned.dtype, device=pruned.device).view(-1, *(1,) * tensors[0].dim())
        if not self.arithmetic.elect:
            return (pruned * weight).sum(0)
        ballot = pruned if self.majority_sign_method == "total" else pruned.sign()
        agree = pruned.sign() == torch.where(ballot.sum(0) >= 0, 1, -1)
        return (pruned * weight * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _pruned(self, tensor: Tensor) -> Tensor:
        density = self.density if self.density is not None else 1.0
        if self.arithmetic.prune == "random":
            return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
        if self.arithmetic.prune is None or density == 1:
            return tensor
        kept = torch.zeros_like(tensor).flatten()
        kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
        return tensor * kept.view_as(tensor)


@dataclass(frozen=True)
class Combined:
    """The configuration and tensors of a new LoRA adapter of scaling 1.

    factors: (A, B) of each layer that is adapted by a part. replaced: values of replaced parameters.
    """

    config: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]
    replaced: dict[str, Tensor]


@torch.no_grad()
def weighted_lora(parts: Sequence[Lora], weights: Sequence[float], combination: Combination) -> Combined:
    """Return the weighted combination of the parts.

    Biases trained by bias="all" or "lora_only" are treated as updates: the weighted sum of their differences from the
    base's biases is added. Other replaced parameters (modules_to_save) are not updates; if one adapter has them, they
    are copied from it.
    Raises ValueError, naming the adapter and the part, for parts that cannot be combined: parameters that two adapters
    replace, DoRA's magnitudes, biases of lora_bias.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"add_weighted_adapter: weights must be one per adapter, got {len(weights)} for {len(parts)}")
    for part in parts:
        for option, why in (
            ("lora_bias", "B's biases"),
            ("use_dora", "DoRA's magnitudes"),
            ("trainable_token_indices", "rows for tokens"),
        ):
            if value := getattr(part.config, option):
                raise ValueError(
                    f"add_weighted_adapter: adapter {part.name!r} must not have {option}={value}, {why} are no part of "
                    "a low-rank sum; merge it instead"
                )
        if part.config.target_parameters:
            raise NotImplementedError(
                f"add_weighted_adapter: adapter {part.name!r} must not have target_parameters, got "
                f"{list(part.config.target_parameters)}; merge it instead"
            )
    combined = {}
    for path in dict.fromkeys(path for part in parts for path in part.deltas):
        there = [(part, weight) for part, weight in zip(parts, weights, strict=True) if path in part.deltas]
        factors = [part.deltas[path].lowrank() for part, _ in there]
        combined[path] = combination.factors(path, factors, [weight for _, weight in there])
    ranks = {path: lora_A.shape[0] for path, (lora_A, _) in combined.items()}
    r = max(ranks.values())
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(ranks),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != r},
        alpha_pattern={path: rank for path, rank in ranks.items() if rank != r},
        task_type=parts[0].config.task_type,
        bias=_joint_bias(parts),
        modules_to_save=list(dict.fromkeys(name for part in parts for name in part.config.modules_to_save or ()))
        or None,
    )
    return Combined(config, combined, _replaced(parts, weights))


def _joint_bias(parts: Sequence[Lora]) -> Literal["none", "all", "lora_only"]:
    trained = {part.config.bias for part in parts}
    if "all" in trained:
        return "all"
    return "lora_only" if "lora_only" in trained else "none"


def _replaced(parts: Sequence[Lora], weights: Sequence[float]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for part in parts for path in part.overrides.copies):
        owners = [(part, weight) for part, weight in zip(parts, weights, strict=True) if path in part.overrides.copies]
        copies = [(part.overrides.copies[path].float(), weight) for part, weight in owners]
        if path.endswith("bias") and not any(contained_in(part.config.heads, path) for part, _ in owners):
            base = owners[0][0].overrides.originals[path].float()
            values[path] = base + sum(weight * (copy - base) for copy, weight in copies)
        elif len(owners) == 1:
            values[path] = copies[0][0]
        else:
            raise ValueError(
                f"add_weighted_adapter: adapters {[part.name for part, _ in owners]} must not both replace {path} "
                "(modules_to_save): trained copies of a module are no updates that add up"
            )
    return values


def single_lora(injector: Injector, name: str) -> Lora:
    """Return the LoRA that adapter `name` consists of; raise TypeError for any other adapter."""
    methods = methods_of(injector, name)
    if len(methods) != 1 or type(methods[0]) is not Lora:
        raise TypeError(f"add_weighted_adapter: adapter {name!r} must be a LoRA adapter")
    return methods[0]


def set_combined(injector: Injector, name: str, combined: Combined) -> None:
    """Set the factors and the replaced parameters of adapter `name`, which was made from `combined.config`."""
    lora = single_lora(injector, name)
    for path, (lora_A, lora_B) in combined.factors.items():
        lora.deltas[path].set_factors(lora_A, lora_B)
    for path, value in combined.replaced.items():
        lora.overrides.copies[path].data.copy_(value)
