"""AdaptedLinear: a base layer and the weight updates of any number of adapters, each asked in its turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base_layer import dense_weight, features, with_weight
from .selection import Selection


class Delta(nn.Module):
    """One adapter's update of one linear layer. A low-rank update gives factors(); any other gives forward()."""

    dropout_p: float = 0.0

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(lora_A [r, K], lora_B [N, r], scaling), where the update is scaling * B A and nothing else; else None."""
        return None

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y plus this update's part.   x [..., K];  y [..., N] = base(x) and the earlier adapters' parts."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """The updated weight.   weight: fp32 [N, K]."""
        lora_A, lora_B, scaling = self.lowrank()
        return weight + scaling * (lora_B.detach().float() @ lora_A.detach().float())

    def lowrank(self) -> tuple[Tensor, Tensor, float]:
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"merge: {type(self).__name__} is not a fixed update of the weight")
        return factors


class AdaptedLinear(nn.Module):
    """y = base(x) + the active adapters' updates; base(x) exactly where none is active.

    Low-rank updates of several adapters are one update: their factors are concatenated along r, so they run as one
    fused call where the base offers forward_lora and the batch has one set of adapters, and as one pair of matmuls
    with the intermediate [.., r_total] masked by row where each row names its own (`adapter_names`).

    Merging puts a merged layer in the base's place and keeps the base aside: unmerging is exact, nothing is undone.
    """

    def __init__(self, base_layer: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.in_features, self.out_features = features(base_layer)
        # Plain dict: the parameters belong to the adapters' trees.
        self.deltas: dict[str, Delta] = {}
        self.unmerged: list[nn.Module] = []  # [the base] while merged; a list keeps it out of the module tree
        self.merged_names: tuple[str, ...] = ()
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's; models look at its dtype and device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={type(delta).__name__}" for name, delta in self.deltas.items())

    def forward(self, x: Tensor) -> Tensor:
        chosen = [name for name in self.deltas if self.selection.has(name)]
        if self.merged_names:
            return self._forward_merged(x)
        if not chosen:
            return self.base_layer(x)  # type: ignore[no-any-return]
        lowrank = [name for name in chosen if self.deltas[name].factors() is not None]
        y = self._lowrank(x, lowrank) if lowrank else self.base_layer(x)
        for name in chosen:
            if name not in lowrank:
                y = self._own_way(self.deltas[name], x, y, self.selection.row_index(name, x))
        return y

    def _forward_merged(self, x: Tensor) -> Tensor:
        if not self.selection.enabled:
            return self.unmerged[0](x)  # type: ignore[no-any-return]
        if self.selection.rows is not None:
            raise ValueError("adapter_names: must not be given while adapters are merged; call unmerge_adapter first")
        return self.base_layer(x)  # type: ignore[no-any-return]

    def _own_way(self, delta: Delta, x: Tensor, y: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return delta(x, y, self.base_layer)  # type: ignore[no-any-return]
        return y.index_copy(0, rows, delta(x[rows], y[rows], self.base_layer))

    def _lowrank(self, x: Tensor, names: Sequence[str]) -> Tensor:
        groups: dict[float, list[str]] = {}
        for name in names:
            delta = self.deltas[name]
            groups.setdefault(delta.dropout_p if delta.training else 0.0, []).append(name)
        (p, first), *others = groups.items()  # one group unless adapters differ in dropout
        y = self._first_group(x, first, p)
        for p, group in others:
            y = add_lowrank(x, y, *self._concatenated(x, group), dropout_p=p)
        return y

    def _first_group(self, x: Tensor, names: Sequence[str], dropout_p: float) -> Tensor:
        lora_A, lora_B, scaling, mask = self._concatenated(x, names)
        fused = getattr(self.base_layer, "forward_lora", None)
        if fused is not None and mask is None:
            return fused(x, lora_A, lora_B, scaling, dropout_p)  # type: ignore[no-any-return]
        return add_lowrank(x, self.base_layer(x), lora_A, lora_B, scaling, mask, dropout_p=dropout_p)

    def _concatenated(self, x: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """The named updates as one: A [r_total, K], B [N, r_total], scaling and, with rows, the mask [B, r_total]."""
        factors = [self.deltas[name].lowrank() for name in names]
        if len(factors) == 1:
            lora_A, lora_B, scaling = factors[0]
        else:
            lora_A = torch.cat([A for A, _, _ in factors])
            lora_B = torch.cat([B * s for _, B, s in factors], dim=1)
            scaling = 1.0
        if self.selection.rows is None:
            return lora_A, lora_B, scaling, None
        owner = [name for name, (A, _, _) in zip(names, factors, strict=True) for _ in range(A.shape[0])]
        mask = torch.tensor([[row == name for name in owner] for row in self.selection.rows_of(x)], device=x.device)
        return lora_A, lora_B, scaling, mask

    def why_not_fused(self) -> str | None:
        """None if the active adapters run in one fused call; else the reason they do not."""
        chosen = [delta for name, delta in self.deltas.items() if self.selection.has(name)]
        if self.merged_names or not chosen:
            return "merged: the base layer alone runs" if self.merged_names else "no adapter is active here"
        if not hasattr(self.base_layer, "forward_lora"):
            return f"{type(self.base_layer).__name__} offers no forward_lora"
        own_way = sorted({type(d).__name__ for d in chosen if d.factors() is None})
        if own_way:
            return f"{', '.join(own_way)} is not a plain low-rank update"
        if self.selection.rows is not None:
            return "adapter_names: one masked pair of matmuls serves all rows"
        if len({d.dropout_p for d in chosen}) > 1 and self.training:
            return "the active adapters differ in dropout"
        return None

    def merge(self, names: Sequence[str], *, target: str, safe_merge: bool) -> tuple[float, float]:
        """Replaces the base by one whose weight includes the named updates.

        Returns Frobenius norms (|error|, |delta|): how far the stored weight is from base + delta, and the update.
        Raises ValueError with safe_merge if the merged weight is not finite.
        """
        base = self.unmerged[0] if self.unmerged else self.base_layer
        names = (*self.merged_names, *(n for n in names if n in self.deltas and n not in self.merged_names))
        weight = dense_weight(base)
        wanted = weight
        for name in names:
            wanted = self.deltas[name].merged(wanted)
        if safe_merge and not torch.isfinite(wanted).all():
            raise ValueError(f"merge: the weights of adapters {list(names)} must be finite")
        merged = with_weight(base, wanted, base.bias, target)  # type: ignore[arg-type]
        self.unmerged, self.base_layer, self.merged_names = [base], merged, names
        return float((dense_weight(merged) - wanted).norm()), float((wanted - weight).norm())

    def unmerge(self) -> None:
        """Puts the kept base layer back: the same object, so the same bits."""
        if self.unmerged:
            self.base_layer, self.unmerged, self.merged_names = self.unmerged[0], [], ()

    def keep_merged(self) -> None:
        """Makes the merged layer the base for good."""
        self.unmerged, self.merged_names = [], ()


def add_lowrank(
    x: Tensor,
    y: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    *,
    dropout_p: float,
) -> Tensor:
    """y + scaling * (dropout(x) A^T * mask) B^T, in the factors' dtype, rounded once to y's.

    x [..., K];  y [..., N];  lora_A [r, K];  lora_B [N, r];  mask bool [B, r] over x's first dimension, or None.
    """
    s = F.linear(F.dropout(x.to(lora_A.dtype), dropout_p), lora_A)
    if mask is not None:
        s = s * mask.view(mask.shape[0], *(1,) * (s.dim() - 2), mask.shape[1])
    return (y + F.linear(s, lora_B) * scaling).to(y.dtype)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Hooks stay at the place in the model where they were registered when another module takes that place.

    Left on a wrapped base they would miss forward_lora. The dictionaries themselves change hands, since the handles
    that remove a hook refer to them.
    """
    for name in _HOOKS:
        mine, theirs = source.__dict__[name], target.__dict__[name]
        source.__dict__[name], target.__dict__[name] = theirs, mine
    source._is_full_backward_hook, target._is_full_backward_hook = None, source._is_full_backward_hook
