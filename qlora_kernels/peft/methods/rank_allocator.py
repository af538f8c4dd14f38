"""The choice of singular values that AdaLoRA keeps: their importance, and the budget of the whole model.

Source: AdaLoRA (arXiv:2303.10512) sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...nn.quantized_weight import cut_as
from ..core.sharded import full_tensor

Triplets = tuple[nn.Parameter, nn.Parameter, nn.Parameter]
"""(lora_A [r, K], lora_E [r, 1], lora_B [N, r]) of one layer: r triplets, each a row, a singular value and a column."""

TRIPLET_DIM = {"lora_A": 0, "lora_E": 0, "lora_B": 1}
"""Dimension of each tensor that indexes the triplets."""


@dataclass(frozen=True)
class BudgetSchedule:
    """Budget b(t): number of triplets of the whole model that are kept at step t, a cubic decay from `start` to `end`.

    b is `start` until step `tinit` and `end` from step `last` = total_step - tfinal on; ranks change at every deltaT-th
    step in between.
    """

    start: int
    end: int
    tinit: int
    last: int
    deltaT: int

    def budget(self, step: int) -> int:
        """Return the number of triplets to keep at this step."""
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int(self.end + (self.start - self.end) * min(max(left, 0.0), 1.0) ** 3)

    def allocates_at(self, step: int) -> bool:
        """Whether the ranks change at this step."""
        return step >= self.last or (step > self.tinit and step % self.deltaT == 0)


class RankAllocator:
    """Running importance of every weight of every triplet.

    I = |w * grad|;  sensitivity <- beta1 * sensitivity + (1 - beta1) * I;
    uncertainty <- beta2 * uncertainty + (1 - beta2) * |I - sensitivity|;  a weight's score is their product.
    """

    def __init__(self, triplets: Callable[[], Sequence[Triplets]], beta1: float, beta2: float) -> None:
        """Make an allocator without averages.

        triplets: callable that returns the triplets of every layer, always in the same order.
        beta1, beta2: decay of the averages of the sensitivity and of its uncertainty.
        """
        self.triplets = triplets
        self.beta1, self.beta2 = beta1, beta2
        # fp32, created at the first update on the device of the weights.
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []

    def forget(self) -> None:
        """Forget the averages, as before the first update."""
        self.sensitivity, self.uncertainty = [], []

    @property
    def weights(self) -> list[nn.Parameter]:
        return [weight for triplets in self.triplets() for weight in triplets]

    @torch.no_grad()
    def update(self) -> None:
        """Update both averages. The gradient of a layer that the last forward did not use counts as zero.

        Raises RuntimeError if no weight has a gradient.
        """
        weights = self.weights
        if all(weight.grad is None for weight in weights):
            raise RuntimeError("AdaLoRA: step must be called after backward and before zero_grad, got no gradients")
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        importance = torch._foreach_mul([w.float() for w in weights], [grad.float() for grad in grads])
        torch._foreach_abs_(importance)
        if not self.sensitivity:
            self.sensitivity = [torch.zeros_like(i) for i in importance]
            self.uncertainty = [torch.zeros_like(i) for i in importance]
        torch._foreach_lerp_(self.sensitivity, importance, 1 - self.beta1)
        torch._foreach_sub_(importance, self.sensitivity)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(self.uncertainty, importance, 1 - self.beta2)

    def scores(self) -> list[Tensor]:
        """Return scores [r] of each layer: the score of E plus the mean scores of its row of A and its column of B."""
        of_weight = [full_tensor(score) for score in torch._foreach_mul(self.sensitivity, self.uncertainty)]
        parts = zip(of_weight[0::3], of_weight[1::3], of_weight[2::3], strict=True)
        return [E.flatten() + A.mean(dim=1) + B.mean(dim=0) for A, E, B in parts]

    @torch.no_grad()
    def keep(self, budget: int) -> list[Tensor]:
        """Return a mask [r] of each layer for the `budget` triplets of highest score, and set the E of the others to
        zero.

        Exactly `budget` triplets are kept, also if scores are equal. A zeroed E still gets a gradient, so its triplet
        may be restored.
        """
        scores = self.scores()
        everything = torch.cat(scores)
        kept = torch.zeros_like(everything, dtype=torch.bool)
        kept[everything.topk(min(budget, everything.numel())).indices] = True
        masks = list(torch.split(kept, [score.numel() for score in scores]))
        for (_, lora_E, _), mask in zip(self.triplets(), masks, strict=True):
            lora_E.masked_fill_(cut_as(lora_E, ~mask[:, None]), 0.0)
        return masks
