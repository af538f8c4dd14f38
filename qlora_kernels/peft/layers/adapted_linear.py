"""AdaptedLinear: a base linear layer plus the updates of any number of adapters, applied in order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..core.adapter_selection import AdapterSelection
from ..core.adapter_tree import AdapterModules
from .base_layer import dense_weight, features, stores_transposed, with_weight
from .lowrank import LoraFactors, add_lowrank, concatenated, forward_lowrank


class Delta(nn.Module):
    """One adapter's update of one linear layer: what it does to the input, to the output, and to weight and bias.

    A low-rank update gives factors() and nothing else. An update that acts on the input gives prepare_input(), one
    that acts on the output gives forward(). With several active adapters each acts on the layer that the earlier ones
    have made, in forward and in merges alike.
    """

    dropout_p: float = 0.0
    acts_on_input: bool = False
    """Whether prepare_input does anything."""
    first_is_outermost: bool = False
    """Whether of consecutive updates of this kind the last acts on the layer first, the others on the result."""

    def factors(self) -> LoraFactors | None:
        """The factors, where the update is scaling * B A and nothing else; else None."""
        return None

    def offset(self) -> Tensor | None:
        """[N], added to every output beside the factors' part; None = nothing."""
        return None

    def updated_bias(self, bias: Tensor | None) -> Tensor | None:
        """The updated bias [N] of a layer with this bias, differentiable; None = no bias."""
        offset = self.offset()
        if offset is None or bias is None:
            return offset if bias is None else bias
        return (bias + offset).to(bias.dtype)

    def prepare_input(self, x: Tensor) -> Tensor:
        """The input [..., K] of the layer and of the earlier adapters' updates, from x [..., K], in its dtype."""
        return x

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y with this update.   x [..., K];  y [..., N]: output of the layer with the earlier adapters' updates."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """The updated weight.   weight: fp32 [N, K]."""
        lora_A, lora_B, scaling = self.lowrank()
        return weight + scaling * (lora_B.detach().float() @ lora_A.detach().float())

    def updated(self, weight: Tensor) -> Tensor:
        """The updated weight in the dtype of `weight` [N, K], differentiable.

        Raises NotImplementedError where the update is not one of the weight.
        """
        lora_A, lora_B, scaling = self.lowrank()
        return weight + (scaling * (lora_B @ lora_A)).to(weight.dtype)

    def lowrank(self) -> LoraFactors:
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"merge: {type(self).__name__} is not a fixed update of the weight")
        return factors


class SharedOutputs(Protocol):
    """The interface of FusedProjections that an adapted layer uses."""

    def output_of(self, layer: AdaptedLinear, x: Tensor) -> Tensor | None:
        """The output of `layer` for x where the group computes it; else None."""


class AdaptedLinear(nn.Module):
    """y = base(x) plus the updates of the active adapters; exactly base(x) if none is active.

    Low-rank updates of several adapters are one update: their factors are concatenated along r, so they run as one
    fused call where the base offers forward_lora; where each row names its own (`adapter_names`), as one call of
    forward_multi_lora, or one pair of matmuls with the middle masked by row.

    A merge keeps the base layer and computes with a second, merged layer, so that unmerging restores the same bits.
    """

    def __init__(self, base_layer: nn.Module, selection: AdapterSelection) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.in_features, self.out_features = features(base_layer)
        self.deltas = AdapterModules()
        self.merged_layer: nn.Module | None = None
        self.merged_names: tuple[str, ...] = ()
        self.fused_projections: SharedOutputs | None = None
        self.weight_is_read = False
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer that computes; most models read only its dtype and device.

        If the model's own code computes with it (`weight_is_read`), it includes the active updates.
        """
        layer = self._computing_layer()
        if self.weight_is_read and layer is self.base_layer:
            return self._updated_weight()
        return layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer that computes, with the active updates where the model reads the weight itself."""
        layer = self._computing_layer()
        bias = cast("Tensor | None", layer.bias)
        if self.weight_is_read and layer is self.base_layer:
            for delta in self._chosen().values():
                bias = delta.updated_bias(bias)
        return bias

    def _updated_weight(self) -> Tensor:
        weight = cast(Tensor, self.base_layer.weight)
        chosen = self._chosen()
        if not chosen:
            return weight
        if self.selection.state.rows is not None:
            raise NotImplementedError(
                "adapter_names: must not be given for a model that reads the weight of an adapted layer instead of "
                "calling the layer; run the rows of each adapter in a batch of their own"
            )
        transposed = stores_transposed(self.base_layer)
        weight = weight.T if transposed else weight
        for name, delta in chosen.items():
            if delta.training and delta.dropout_p:
                # A model may read the weight for a kernel that it then has not, and call the layer after all.
                warnings.warn(
                    f"lora_dropout: {delta.dropout_p} of adapter {name!r} does not act where a model reads the weight "
                    "of an adapted layer instead of calling the layer; the update itself does",
                    stacklevel=3,
                )
            weight = delta.updated(weight)
        return weight.T if transposed else weight

    def _computing_layer(self) -> nn.Module:
        if self.merged_layer is None or not self.selection.state.enabled:
            return self.base_layer
        return self.merged_layer

    def _chosen(self) -> dict[str, Delta]:
        """The updates that act in the running call, in the order in which they act on the layer."""
        state = self.selection.state
        names = self.deltas if state.rows is not None else state.active if state.enabled else ()
        return in_order({n: cast(Delta, self.deltas[n]) for n in names if n in self.deltas and state.has(n)})

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_layer is not None:
            if self.selection.state.enabled and self.selection.state.rows is not None:
                raise ValueError(
                    "adapter_names: must not be given while adapters are merged; call unmerge_adapter first"
                )
            return self._computing_layer()(x)  # type: ignore[no-any-return]
        state = self.selection.state
        chosen = {name: cast(Delta, delta) for name, delta in self.deltas.items() if state.has(name)}
        if not chosen:
            return self.base_layer(x)  # type: ignore[no-any-return]
        # Without an assignment inside the comprehension: torch.compile would break the graph there.
        factors = {name: delta.factors() for name, delta in chosen.items()}
        lowrank = {name: update for name, update in factors.items() if update is not None}
        by_row = state.rows is not None
        if len(lowrank) < len(chosen):
            return self._in_order(x, self._chosen(), lowrank, by_row=by_row)
        y = self._lowrank(x, lowrank, by_row=by_row)
        for name, delta in chosen.items():
            if (offset := delta.offset()) is not None:
                y = self._add_offset(name, offset, x, y)
        return y

    def _in_order(
        self, x: Tensor, chosen: dict[str, Delta], lowrank: dict[str, LoraFactors], *, by_row: bool
    ) -> Tensor:
        """The output where some update is not of low rank.   lowrank: factors of those that are."""
        rows = {name: self.selection.row_index(name, x) if by_row else None for name in chosen}
        inputs: dict[str, Tensor] = {}
        for name, delta in reversed(chosen.items()):
            inputs[name] = x
            if delta.acts_on_input:
                own_rows = rows[name]
                if own_rows is None:
                    x = delta.prepare_input(x)
                else:
                    x = x.index_copy(0, own_rows, delta.prepare_input(x[own_rows]))
        # One call for the base and the low-rank updates that come first. Where each row has one adapter, no order is
        # to be kept.
        fused = dict(lowrank)
        if not by_row:
            others = [name for name in chosen if name not in lowrank or inputs[name] is not x]
            first = list(chosen).index(others[0]) if others else len(chosen)
            fused = {name: lowrank[name] for name in list(chosen)[:first]}
        y: Tensor = self._lowrank(x, fused, by_row=by_row) if fused else self.base_layer(x)
        for name, delta in chosen.items():
            if name not in fused:
                y = self._apply_delta(delta, inputs[name], y, rows[name])
            elif (offset := delta.offset()) is not None:
                y = self._add_offset(name, offset, x, y)
        return y

    def _add_offset(self, name: str, offset: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """y plus the bias [N] of adapter `name`, in its rows of x where each row has an adapter of its own."""
        offset, rows = offset.to(y.dtype), self.selection.row_index(name, x)
        return y + offset if rows is None else y.index_add(0, rows, offset.expand_as(y[rows]))

    def _apply_delta(self, delta: Delta, x: Tensor, y: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return delta(x, y, self.base_layer)  # type: ignore[no-any-return]
        return y.index_copy(0, rows, delta(x[rows], y[rows], self.base_layer))

    def _lowrank(self, x: Tensor, updates: dict[str, LoraFactors], *, by_row: bool) -> Tensor:
        """base(x) and the updates; one call for all, and a pair of matmuls for each further rate of dropout.

        by_row: whether each row of x has an adapter of its own.
        """
        if self.fused_projections is not None:
            shared = self.fused_projections.output_of(self, x)
            if shared is not None:
                return shared
        groups: dict[float, list[str]] = {}
        for name in updates:
            delta = cast(Delta, self.deltas[name])
            groups.setdefault(delta.dropout_p if delta.training else 0.0, []).append(name)
        y: Tensor | None = None
        for dropout_p, names in groups.items():
            group, owner = [updates[name] for name in names], self.selection.owners(names, x) if by_row else None
            if y is None:
                y = forward_lowrank(self.base_layer, x, group, dropout_p=dropout_p, owner=owner)
            else:
                y = add_lowrank(x, y, group, dropout_p=dropout_p, owner=owner)
        return cast(Tensor, y)

    def fusable_update(self) -> tuple[LoraFactors, float] | None:
        """(the active low-rank updates as one, its dropout) where they are one call of forward_lora; else None."""
        if self.merged_layer is not None or self.selection.state.rows is not None:
            return None
        chosen = self._chosen().values()
        factors = [delta.factors() for delta in chosen]
        updates = [update for update in factors if update is not None]
        rates = {delta.dropout_p if delta.training else 0.0 for delta in chosen}
        if len(updates) < len(factors) or len(rates) != 1:
            return None
        return concatenated(updates), rates.pop()

    @property
    def is_tokenwise(self) -> bool:
        """Whether the output of each token depends on that token alone, not on its row of the batch."""
        return self.selection.state.rows is None

    def plain_form(self) -> tuple[nn.Module, LoraFactors | None] | None:
        """(the layer that computes, the active low-rank updates as one) where the output is exactly their sum.

        None where anything else takes part: dropout, an offset, other kinds of updates, an adapter for each row.
        """
        if not self.is_tokenwise:
            return None
        if self.merged_layer is not None:
            return self._computing_layer(), None
        chosen = self._chosen().values()
        if not chosen:
            return self.base_layer, None
        update = self.fusable_update()
        if update is None or update[1] > 0 or any(delta.offset() is not None for delta in chosen):
            return None
        return self.base_layer, update[0]

    def fusion_unsupported(self) -> str | None:
        """None if the active adapters run in one fused call; else the reason they do not."""
        chosen = self._chosen().values()
        if self.merged_layer is not None or not chosen:
            return "merged: one layer runs" if self.merged_layer is not None else "no adapter is active here"
        if not hasattr(self.base_layer, "forward_lora"):
            return f"{type(self.base_layer).__name__} offers no forward_lora"
        others = sorted({type(d).__name__ for d in chosen if d.factors() is None})
        if others:
            return f"{', '.join(others)} is not a plain low-rank update, or hooks watch its layers"
        if self.selection.state.rows is not None and not hasattr(self.base_layer, "forward_multi_lora"):
            return "adapter_names: one masked pair of matmuls serves all rows"
        if len({d.dropout_p for d in chosen}) > 1 and self.training:
            return "the active adapters differ in dropout"
        return None

    def merge(
        self, names: Sequence[str], *, target: str, safe_merge: bool, default: torch.dtype = torch.float32
    ) -> tuple[float, float]:
        """Compute with a layer whose weight includes the named updates and those merged before.

        default: dtype of a dense merged weight whose base does not say which it was quantized from.
        Returns Frobenius norms (|error|, |delta|): how far the stored weight is from base + delta, and the update.
        Raises ValueError with safe_merge if the merged weight is not finite.
        """
        base = self.base_layer
        names = (*self.merged_names, *(n for n in names if n in self.deltas and n not in self.merged_names))
        weight = dense_weight(base)
        wanted = weight
        bias = cast("Tensor | None", getattr(base, "bias", None))
        for delta in in_order({name: cast(Delta, self.deltas[name]) for name in names}).values():
            wanted, bias = delta.merged(wanted), delta.updated_bias(bias)
        if safe_merge and not torch.isfinite(wanted).all():
            raise ValueError(f"merge: the weights of adapters {list(names)} must be finite")
        merged = with_weight(base, wanted, bias, target, default=default)
        self.merged_layer, self.merged_names = merged, names
        return float((dense_weight(merged) - wanted).norm()), float((wanted - weight).norm())

    def unmerge(self) -> None:
        """Compute with the base layer again; it is the same object, so its bits are the same."""
        self.merged_layer, self.merged_names = None, ()

    def keep_merged(self) -> None:
        """Replace the base layer by the merged layer for good."""
        if self.merged_layer is not None:
            self.base_layer, self.merged_layer, self.merged_names = self.merged_layer, None, ()


class AdaptedEmbedding(AdaptedLinear):
    """An embedding seen as a linear layer of one-hot tokens: in_features is the size of its vocabulary."""

    @property
    def bias(self) -> None:
        """None, because an embedding has no bias."""
        return None

    @property
    def num_embeddings(self) -> int:
        """The size of the vocabulary, as nn.Embedding names it."""
        return self.in_features

    @property
    def embedding_dim(self) -> int:
        """The size of an embedding, as nn.Embedding names it."""
        return self.out_features

    @property
    def padding_idx(self) -> int | None:
        """The padding index of the base embedding, or None."""
        return self.base_layer.padding_idx  # type: ignore[return-value]


def in_order(updates: dict[str, Delta]) -> dict[str, Delta]:
    """The updates of a layer in the order in which they act on it, given them in the order of their adapters."""
    if not any(delta.first_is_outermost for delta in updates.values()):
        return updates
    runs: list[list[tuple[str, Delta]]] = []
    for item in updates.items():
        if runs and item[1].first_is_outermost and type(runs[-1][-1][1]) is type(item[1]):
            runs[-1].insert(0, item)
        else:
            runs.append([item])
    return dict(item for run in runs for item in run)


def base_of(module: nn.Module) -> nn.Module:
    """Return the base layer of an adapted layer, and any other module unchanged."""
    return module.base_layer if isinstance(module, AdaptedLinear) else module
