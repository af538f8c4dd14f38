"""AdaptedLinear: a base linear layer plus the updates of any number of adapters, applied in order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ...nn.module_tree import has_hooks
from ..core.adapter_selection import AdapterSelection
from ..core.adapter_tree import AdapterModules
from .base_layer import dense_weight, features, stores_transposed, with_weight
from .delta import Delta, in_order
from .lowrank import LoraFactors, add_lowrank, concatenated, forward_lowrank


class SharedOutputs(Protocol):
    """The interface of FusedProjections that an adapted layer uses."""

    def output_of(self, layer: AdaptedLinear, x: Tensor) -> Tensor | None:
        """Return the output of `layer` for x if the group computes it, otherwise None."""


class AdaptedLinear(nn.Module):
    """y = base(x) plus the updates of the active adapters; exactly base(x) if none is active.

    Low-rank updates of several adapters are concatenated along r, so that they run as one call of forward_lora if the
    base has it. With adapters by row (`adapter_names`) they run as one call of forward_multi_lora, or as one pair of
    matmuls whose intermediate result is masked by row.

    A merge keeps the base layer and adds a second, merged layer, so that unmerging restores the same bits.
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
        """Whether the model's own code computes with the weight of the layer instead of calling the layer."""
        self.is_output_head = False
        """Whether trainers may do so, to compute a loss without all logits (TRL)."""
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight of the base or merged layer; most models read only its dtype and device.

        If other code computes with it (`weight_is_read`, `is_output_head`), it includes the active updates.
        """
        layer = self._computing_layer()
        if layer is self.base_layer and self._gives_updates():
            return self._updated_weight()
        return layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base or merged layer, with the active updates where the weight includes them."""
        layer = self._computing_layer()
        bias = cast("Tensor | None", layer.bias)
        if layer is self.base_layer and self._gives_updates():
            for delta in self._chosen().values():
                bias = delta.updated_bias(bias)
        return bias

    def _gives_updates(self) -> bool:
        """Whether `weight` and `bias` include the active updates."""
        # A head's weight is also read for its dtype (Mamba), by rows as well; trainers name no adapters by row.
        return self.weight_is_read or (self.is_output_head and self.selection.state.rows is None)

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
        transposed, shape = stores_transposed(self.base_layer), weight.shape
        weight = weight.T if transposed else weight.flatten(1)  # a convolution's weight has more dimensions
        for name, delta in chosen.items():
            if delta.training and delta.dropout_p:
                # A model may read the weight for a fused kernel that is not installed, and then call the layer.
                warnings.warn(
                    f"lora_dropout: {delta.dropout_p} of adapter {name!r} does not act where a model reads the weight "
                    "of an adapted layer instead of calling the layer; the update itself does",
                    stacklevel=3,
                )
            weight = delta.updated(weight, self.base_layer)
        return weight.T if transposed else weight.view(shape)

    def _computing_layer(self) -> nn.Module:
        if self.merged_layer is None or not self.selection.state.enabled:
            return self.base_layer
        return self.merged_layer

    def _chosen(self) -> dict[str, Delta]:
        """Return the active updates of the running call, in the order in which they are applied."""
        state = self.selection.state
        names = self.deltas if state.rows is not None else state.active
        return in_order({n: cast(Delta, self.deltas[n]) for n in names if n in self.deltas and state.has(n)})

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the active updates. Raises ValueError for rows while adapters are merged."""
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
        # No assignment inside the comprehension, because torch.compile would break the graph there.
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
        """Compute the output if some updates are not of low rank. lowrank: factors of the low-rank updates."""
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
        # One call computes the base and the leading low-rank updates. With one adapter for each row the order is
        # irrelevant.
        fused = dict(lowrank)
        if not by_row:
            others = [name for name in chosen if name not in lowrank or inputs[name] is not x]
            first = list(chosen).index(others[0]) if others else len(chosen)
            fused = {name: lowrank[name] for name in list(chosen)[:first]}
        bias = cast("Tensor | None", getattr(self.base_layer, "bias", None))
        computed = set(fused)
        y = self._first_output(x, chosen, bias) if not fused and not by_row else None
        if y is not None:
            computed.add(next(iter(chosen)))
        else:
            y = self._lowrank(x, fused, by_row=by_row) if fused else self.base_layer(x)
        for name, delta in chosen.items():
            if name not in computed:
                y = self._apply_delta(delta, inputs[name], y, bias, rows[name])
            elif (offset := delta.offset()) is not None:
                y = self._add_offset(name, offset, x, y)
            if not by_row:  # where each row has one adapter, none is earlier
                bias = delta.updated_bias(bias)
        return y

    def _first_output(self, x: Tensor, chosen: dict[str, Delta], bias: Tensor | None) -> Tensor | None:
        first = next(iter(chosen.values()), None)
        return None if first is None else first.first_output(x, self.base_layer, bias)

    def _add_offset(self, name: str, offset: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the offset [N] of adapter `name`, added only to its rows if adapters are given by row."""
        offset, rows = offset.to(y.dtype), self.selection.row_index(name, x)
        return y + offset if rows is None else y.index_add(0, rows, offset.expand_as(y[rows]))

    def _apply_delta(self, delta: Delta, x: Tensor, y: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
        if rows is None:
            return delta(x, y, self.base_layer, bias)  # type: ignore[no-any-return]
        return y.index_copy(0, rows, delta(x[rows], y[rows], self.base_layer, bias))

    def _lowrank(self, x: Tensor, updates: dict[str, LoraFactors], *, by_row: bool) -> Tensor:
        """Return base(x) plus the updates, by one call and one pair of matmuls for each further dropout rate.

        by_row: whether adapters are given by row.
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
        """Return (the active low-rank updates as one, its dropout) if they run as one call of forward_lora, otherwise
        None.
        """
        if self.merged_layer is not None or self.selection.state.rows is not None or has_hooks(self.base_layer):
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
        """Return whether the output of each token depends on that token only, and not on its row of the batch."""
        return self.selection.state.rows is None

    def plain_form(self) -> tuple[nn.Module, LoraFactors | None] | None:
        """Return (base or merged layer, the active low-rank updates as one) if the output is exactly their sum.

        Returns None with dropout, an offset, other kinds of updates, or adapters by row.
        """
        form = self.low_rank_form()
        return None if form is None or form[2] > 0 else form[:2]

    def low_rank_form(self) -> tuple[nn.Module, LoraFactors | None, float] | None:
        """Return (base or merged layer, the active low-rank updates as one, their dropout) if the output is their sum.

        Returns None with an offset, other kinds of updates, several dropout rates, adapters by row, or a dropout mask
        that several layers share (`fuse_shared_input`).
        """
        if not self.is_tokenwise:
            return None
        if self.merged_layer is not None:
            return self._computing_layer(), None, 0.0
        updates, dropout_p = [], None
        for delta in self._chosen().values():
            update, own = delta.factors(), delta.dropout_p if delta.training else 0.0
            if update is None or delta.offset() is not None or dropout_p not in (None, own):
                return None
            updates.append(update)
            dropout_p = own
        if not updates or dropout_p is None:
            return self.base_layer, None, 0.0
        if dropout_p > 0 and self.fused_projections is not None:
            return None
        return self.base_layer, concatenated(updates), dropout_p

    def fusion_unsupported(self) -> str | None:
        """Return None if the active adapters run in one fused call, otherwise the reason why not."""
        chosen = self._chosen().values()
        if self.merged_layer is not None or not chosen:
            return "merged: one layer runs" if self.merged_layer is not None else "no adapter is active here"
        if not hasattr(self.base_layer, "forward_lora"):
            return f"{type(self.base_layer).__name__} offers no forward_lora"
        if has_hooks(self.base_layer):
            return "hooks watch the layer"
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

        default: dtype of a dense merged weight if the base does not record the dtype before quantization.
        Returns the Frobenius norms (|error|, |delta|) of stored weight - (base + delta) and of the update.
        Raises ValueError with safe_merge if the merged weight is not finite.
        """
        base = self.base_layer
        names = (*self.merged_names, *(n for n in names if n in self.deltas and n not in self.merged_names))
        weight = dense_weight(base)
        wanted = weight
        bias = cast("Tensor | None", getattr(base, "bias", None))
        for delta in in_order({name: cast(Delta, self.deltas[name]) for name in names}).values():
            wanted, bias = delta.merged(wanted, base), delta.updated_bias(bias)
        if safe_merge and not torch.isfinite(wanted).all():
            raise ValueError(f"merge: the weights of adapters {list(names)} must be finite")
        merged = with_weight(base, wanted, bias, target, default=default)
        self.merged_layer, self.merged_names = merged, names
        return float((dense_weight(merged) - wanted).norm()), float((wanted - weight).norm())

    def unmerge(self) -> None:
        """Compute with the base layer again, which is the same object with the same bits."""
        self.merged_layer, self.merged_names = None, ()

    def keep_merged(self) -> None:
        """Replace the base layer by the merged layer permanently."""
        if self.merged_layer is not None:
            self.base_layer, self.merged_layer, self.merged_names = self.merged_layer, None, ()


class AdaptedEmbedding(AdaptedLinear):
    """An adapted embedding, as a linear layer with one-hot inputs: in_features is the size of its vocabulary."""

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


class AdaptedConvolution(AdaptedLinear):
    """An adapted convolution, as a linear layer over patches of its input; it has the attributes of its base layer."""

    def __init__(self, base_layer: nn.Module, selection: AdapterSelection) -> None:
        super().__init__(base_layer, selection)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(base_layer, name))
        self.padding_mode = cast(nn.Conv2d, base_layer).padding_mode


def base_of(module: nn.Module) -> nn.Module:
    """Return the base layer of an adapted layer, and any other module unchanged."""
    return module.base_layer if isinstance(module, AdaptedLinear) else module
