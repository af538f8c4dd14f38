"""PrefixSlot: a child of an attention module with the keys and values that adapters prepend.

Prefixes are concatenated inside the attention computation, after rotary embedding and after the cache. They therefore
work in encoders, generate() computes the same as forward(), gradient checkpointing recomputes them, and no argument for
a cache is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter_selection import AdapterSelection
from ..core.adapter_tree import AdapterModules


class Prefix(NamedTuple):
    """One adapter's keys and values [B, heads_kv, n, head_dim], without B if all rows have the same.

    gate: [B, S_q, 1], factor of both keys and values for each query, or None.
    """

    keys: Tensor
    values: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True)
class Prefixes:
    """The concatenated prefixes of the active adapters. visible: bool [B, 1, 1, n], or None if every row attends to all
    n positions.
    """

    parts: dict[str, Prefix]
    visible: Tensor | None = None

    @property
    def lengths(self) -> dict[str, int]:
        """The number of prefix positions of each entry of the slot."""
        return {name: part.keys.shape[-2] for name, part in self.parts.items()}

    @property
    def gates(self) -> list[Tensor]:
        """The gates of those prefixes that have one, in order."""
        return [part.gate for part in self.parts.values() if part.gate is not None]

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (q, k, v) over [prefixes; own].

        A gate g of a query scales q.k and v of its prefix only. This is plain attention with another head_dim
        dimensions for each gate: q' = [q, g q], own k' = [k, 0], prefix k' = [0, k], and values likewise; out()
        multiplies the slices by the gates.
        """
        gates, gated = self.gates, 0
        keys, values = [], []
        for part in self.parts.values():
            gated += part.gate is not None
            place = 0 if part.gate is None else gated
            keys.append(_in_slice(place, len(gates), part.keys.to(k.dtype).expand(k.shape[0], -1, -1, -1)))
            values.append(_in_slice(place, len(gates), part.values.to(v.dtype).expand(v.shape[0], -1, -1, -1)))
        if gates:
            q = torch.cat([q, *(q * gate[:, None].to(q.dtype) for gate in gates)], dim=-1)
        keys.append(_in_slice(0, len(gates), k))
        values.append(_in_slice(0, len(gates), v))
        return q, torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def out(self, heads: Tensor) -> Tensor:
        """Sum the slices: [B, S_q, heads, (1 + gates) * head_dim] -> [B, S_q, heads, head_dim]."""
        own, *gated = heads.chunk(1 + len(self.gates), dim=-1)
        for part, gate in zip(gated, self.gates, strict=True):
            own = own + part * gate[..., None].to(part.dtype)
        return own


def _in_slice(place: int, gates: int, x: Tensor) -> Tensor:
    """Return x [..., d] in slice number `place` of [..., (1 + gates) * d], zero elsewhere."""
    d = x.shape[-1]
    return F.pad(x, (d * place, d * (gates - place))) if gates else x


class PrefixSource(nn.Module):
    """One adapter's part in one attention; a call returns a Prefix.

    `bias`: T5's relative position bias (queries, n, past) -> [1, heads, queries, n], if the prefix has positions.
    """

    def __init__(self, adapter: str) -> None:
        super().__init__()
        self.adapter = adapter
        self.bias: nn.Module | None = None

    def forward(self) -> Prefix:
        raise NotImplementedError


class PrefixSlot(AdapterModules):
    """Child `prefix_slot` of an attention module, which holds the PrefixSource of each adapter.

    `seen`: a list to which the model's own keys and values are appended, or None.
    """

    def __init__(self, selection: AdapterSelection) -> None:
        super().__init__()
        self.selection = selection
        self.seen: list[tuple[Tensor, Tensor]] | None = None

    def read(self, k: Tensor, v: Tensor) -> Prefixes | None:
        """Return the active prefixes for k and v [B, heads_kv, S, head_dim], or None. Each row gets the prefix of its
        own adapter.
        """
        if self.seen is not None:
            self.seen.append((k, v))
        sources = {
            key: source for key, source in self.items() if self.selection.has(cast(PrefixSource, source).adapter)
        }
        if not sources:
            return None
        prefixes = Prefixes({key: source() for key, source in sources.items()})
        if self.selection.state.rows is None:
            return prefixes
        rows = self.selection.rows_of(k.shape[0])
        adapters = {key: cast(PrefixSource, source).adapter for key, source in sources.items()}
        seen = [[row == adapters[key] for key, n in prefixes.lengths.items() for _ in range(n)] for row in rows]
        device = next(iter(prefixes.parts.values())).keys.device
        return Prefixes(prefixes.parts, torch.tensor(seen, device=device)[:, None, None])


def extend_mask(mask: Tensor | None, prefix: Prefixes, q: Tensor, k: Tensor, *, causal: bool) -> Tensor | None:
    """Return the attention mask over [prefix; keys]: `mask` (bool, True is visible; or float, added) with columns in
    front.

    q [B, heads, S_q, d], k [B, heads_kv, S_k, d] before the prefix is joined.
    causal: the meaning of a mask of None.
    """
    n = sum(prefix.lengths.values())
    queries, length = q.shape[2], k.shape[2]
    if mask is None:
        if prefix.visible is None and not (causal and queries > 1):
            return None
        mask = torch.ones(queries, length, dtype=torch.bool, device=q.device)
        mask = (mask.tril() if causal and queries > 1 else mask)[None, None]
    front = torch.ones(1, 1, 1, n, dtype=torch.bool, device=q.device) if prefix.visible is None else prefix.visible
    if mask.dtype != torch.bool:
        front = torch.where(front, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    rows = max(mask.shape[0], front.shape[0])
    front = front.expand(rows, mask.shape[1], mask.shape[2], n)
    return torch.cat([front, mask.expand(rows, -1, -1, -1)], dim=-1)


def attention_slot(attention: nn.Module, selection: AdapterSelection) -> PrefixSlot:
    """Return the slot of an attention module, created if it does not exist."""
    slot: PrefixSlot | None = getattr(attention, SLOT, None)
    if slot is None:
        if not getattr(attention, "reads_prefix_slot", False):
            _use_prefix_attention(attention)
        slot = PrefixSlot(selection)
        attention.add_module(SLOT, slot)
    return slot


# transformers' models look up their attention function by the name in config._attn_implementation.

SLOT = "prefix_slot"
_PREFIXED = "qlora_kernels_prefix_"


def _modeling(attention: nn.Module) -> ModuleType:
    return sys.modules[type(attention).__module__]


def _use_prefix_attention(attention: nn.Module) -> None:
    """Make the attention module's model call attention_with_prefix around the implementation it uses now.

    Raises NotImplementedError for a model without transformers' attention interface, or with another implementation
    than eager or sdpa, because the others do not take a mask that can be extended by a prefix.
    """
    modeling, config = _modeling(attention), getattr(attention, "config", None)
    interface = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    if interface is None or config is None:
        raise NotImplementedError(f"prefix: {type(attention).__name__} must use transformers' attention interface")
    name = config._attn_implementation
    if name.startswith(_PREFIXED):
        return
    if name not in ("eager", "sdpa"):
        raise NotImplementedError(f"prefix: attn_implementation must be 'sdpa' or 'eager', got {name!r}")
    masks = sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS
    interface.register(_PREFIXED + name, _eager_with_prefix if name == "eager" else _sdpa_with_prefix)
    masks.register(_PREFIXED + name, masks[name])
    config._attn_implementation = _PREFIXED + name


def restore_attention(attention: nn.Module, others: Iterable[nn.Module]) -> None:
    """Undo attention_slot once no adapter uses the slot.

    others: the attention modules that have a slot. Modules with the same configuration use the same implementation.
    """
    if SLOT not in attention._modules:
        config = getattr(attention, "config", None)
        if config is not None and not any(getattr(other, "config", None) is config for other in others):
            config._attn_implementation = config._attn_implementation.removeprefix(_PREFIXED)


def _sdpa_with_prefix(attention: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    inner = _modeling(attention).ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attention_with_prefix(inner, attention, *args, **kwargs)


def _eager_with_prefix(attention: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return attention_with_prefix(_modeling(attention).eager_attention_forward, attention, *args, **kwargs)


def attention_with_prefix(
    inner: Callable[..., tuple[Tensor, Tensor | None]],
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run `inner`, an attention function of transformers, over [prefix; key] and [prefix; value]."""
    extra: dict[str, Any] = {} if is_causal is None else {"is_causal": is_causal}
    slot: PrefixSlot | None = getattr(attention, SLOT, None)
    prefix = slot.read(key, value) if slot is not None else None
    if slot is None or prefix is None:
        if position_bias is not None:
            extra["position_bias"] = position_bias
        return inner(attention, query, key, value, attention_mask, **extra, **kwargs)
    causal = bool(getattr(attention, "is_causal", True)) if is_causal is None else is_causal
    mask = extend_mask(attention_mask, prefix, query, key, causal=causal)
    if position_bias is not None:
        extra["position_bias"] = torch.cat([_prefix_bias(slot, prefix, query, key, position_bias), position_bias], -1)
    heads, weights = inner(attention, *prefix.join(query, key, value), mask, **extra, **kwargs)
    return prefix.out(heads), weights


def _prefix_bias(slot: PrefixSlot, prefix: Prefixes, query: Tensor, key: Tensor, position_bias: Tensor) -> Tensor:
    """Return T5's position bias of the prefix columns: zero, or by distance if the adapter's prefix has positions."""
    queries = query.shape[2]
    past = key.shape[2] - queries
    columns = []
    for entry, n in prefix.lengths.items():
        part = cast(PrefixSource, slot[entry])
        zeros = position_bias.new_zeros(1, position_bias.shape[1], queries, n)
        columns.append(zeros if part.bias is None else part.bias(queries, n, past).to(position_bias.dtype))
    return torch.cat(columns, dim=-1).expand(position_bias.shape[0], -1, -1, -1)
