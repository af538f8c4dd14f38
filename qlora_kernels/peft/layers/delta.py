"""Delta: one adapter's update of one linear layer, and the order in which the updates of a layer are applied."""

from __future__ import annotations

from torch import Tensor, nn

from .lowrank import LoraFactors


class Delta(nn.Module):
    """One adapter's update of one linear layer: its effect on input, output, weight and bias.

    A low-rank update implements factors() only. An update of the input implements prepare_input(), an update of the
    output forward(). With several active adapters, each is applied to the layer with the earlier updates, in forward
    and in merges.
    """

    dropout_p: float = 0.0
    acts_on_input: bool = False
    """Whether the update changes the input in prepare_input."""
    first_is_outermost: bool = False
    """Whether consecutive updates of this kind are applied in reverse order, the last one first."""

    def factors(self) -> LoraFactors | None:
        """Return the factors if the update is exactly scaling * B A, otherwise None."""
        return None

    def offset(self) -> Tensor | None:
        """Return a vector [N] that is added to every output in addition to the factors' part, or None."""
        return None

    def updated_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the updated bias [N] of a layer with this bias, differentiable; None = no bias."""
        offset = self.offset()
        if offset is None or bias is None:
            return offset if bias is None else bias
        return (bias + offset).to(bias.dtype)

    def prepare_input(self, x: Tensor) -> Tensor:
        """Return the input [..., K] of the layer and of the earlier updates, from x [..., K], in x's dtype."""
        return x

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        """Return y with this update.

        x: [..., K], the layer's input.   y: [..., N], the output of the layer with the earlier adapters' updates.
        base: the layer without updates.   bias: [N], the part of y that is a bias, with the earlier adapters' updates.
        """
        raise NotImplementedError

    def first_output(self, x: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor | None:
        """Return the output with this update alone where that takes less work than forward() after base(x), or None.

        x: [..., K], the layer's input.   base: the layer without updates.   bias: [N], its bias.
        """
        return None

    def merged(self, weight: Tensor, base: nn.Module) -> Tensor:
        """Return the updated weight, without dropout.

        weight: fp32 [N, K], with the earlier adapters' updates.   base: the layer without updates.
        """
        lora_A, lora_B, scaling = self.lowrank()
        return weight + scaling * (lora_B.detach().float() @ lora_A.detach().float())

    def updated(self, weight: Tensor, base: nn.Module) -> Tensor:
        """Return the updated weight in the dtype of `weight` [N, K], differentiable.   base: as for merged().

        Raises NotImplementedError if the update is not an update of the weight.
        """
        lora_A, lora_B, scaling = self.lowrank()
        return weight + (scaling * (lora_B @ lora_A)).to(weight.dtype)

    def lowrank(self) -> LoraFactors:
        """Return the factors of the update. Raises NotImplementedError if it is not a fixed low-rank update."""
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(
                f"merge: the adapter must be a fixed update of the weight, got {type(self).__name__}; keep it unmerged"
            )
        return factors


def in_order(updates: dict[str, Delta]) -> dict[str, Delta]:
    """Return the updates of a layer in the order in which they are applied, from the order of their adapters."""
    if not any(delta.first_is_outermost for delta in updates.values()):
        return updates
    runs: list[list[tuple[str, Delta]]] = []
    for item in updates.items():
        if runs and item[1].first_is_outermost and type(runs[-1][-1][1]) is type(item[1]):
            runs[-1].insert(0, item)
        else:
            runs.append([item])
    return dict(item for run in runs for item in run)
