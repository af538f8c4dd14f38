"""transformers' `sdpa` attention function on the attention op, for training and prefill on a CPU.

The function's mask is a boolean matrix for each sequence, or None. Causal masks, sliding windows, padding and packed
documents give each query a contiguous range of keys, which the op takes as arguments. Torch runs all other calls: masks
with gaps or numbers, dropout, single queries, other devices, and instruction sets for which the op was not measured to
be faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..format.quant_state import FLOAT_DTYPES
from ..ops.attention import attention
from ..ops.registry import unavailable

_MEASURED_SETS = ("amx_bf16", "amx_bf16_emulated", "avx512_bf16_fma", "avx512_bf16", "avx512", "avx2")
"""Instruction sets of the CPU library on which the op is faster than torch (docs/fuse_model.md)."""

_REFUSED = ("position_bias", "softcap", "output_attentions")
"""Arguments of the sdpa function that the op does not support."""

KeyRanges = tuple[Tensor, Tensor]


def fused_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the sdpa function's output [B, T, H, D], or None if the op does not support the arguments."""
    if (
        not query.dtype == key.dtype == value.dtype
        or key.shape != value.shape
        or not _is_served(query, query.shape[2], dropout, kwargs)
    ):
        return None
    if mask is None:
        is_causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if causal and query.shape[2] != key.shape[2]:
            return None
        return attention(query, key, value, causal=causal, scale=scaling).transpose(1, 2)
    ranges = key_ranges(mask, query.shape[0])
    if ranges is None:
        return None
    return attention(query, key, value, causal=False, key_ranges=ranges, scale=scaling).transpose(1, 2)


def self_attention_ranges(
    module: Any, hidden: Tensor, mask: Tensor | None, shared: Tensor, *, dropout: float, **kwargs: Any
) -> KeyRanges | None:
    """Return the keys of each query in the attention of hidden [B, T, C] to itself, as `fused_sdpa` chooses them.

    shared: a tensor that all layers of a model receive in one call; the ranges without a mask are cached on it.
    The result is (starts, ends), int64 [B, T], or None where fused_sdpa would not run the op.
    """
    B, T, _ = hidden.shape
    if not _is_served(hidden, T, dropout, kwargs):
        return None
    if mask is not None:
        return key_ranges(mask, B) if tuple(mask.shape[2:]) == (T, T) else None
    is_causal = kwargs.get("is_causal")
    kind = (B, T, bool(getattr(module, "is_causal", True) if is_causal is None else is_causal))
    known: dict[tuple[int, int, bool], KeyRanges] | None = getattr(shared, "_qlora_key_ranges", None)
    if known is None:
        known = shared._qlora_key_ranges = {}  # type: ignore[attr-defined]
    if kind not in known:
        known[kind] = _ranges_without_mask(*kind)
    return known[kind]


def _ranges_without_mask(batch: int, length: int, causal: bool) -> KeyRanges:
    starts = torch.zeros(batch, length, dtype=torch.int64, device="cpu")
    if not causal:
        return starts, torch.full_like(starts, length)
    return starts, torch.arange(1, length + 1, device="cpu").expand(batch, length).contiguous()


def _is_served(tensor: Tensor, queries: int, dropout: float, kwargs: dict[str, Any]) -> bool:
    return (
        not dropout
        and tensor.device.type == "cpu"
        and tensor.dtype in FLOAT_DTYPES
        and queries >= 2
        and not torch.compiler.is_compiling()
        and not any(kwargs.get(name) for name in _REFUSED)
        and _library_is_quick()
    )


def key_ranges(mask: Tensor, batch: int) -> KeyRanges | None:
    """Return (starts, ends), int64 [batch, Tq], of a boolean mask [batch or 1, 1, Tq, Tk], or None if it has gaps.

    The result is cached on the mask, which all layers of a model share, until the mask is modified.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch):
        return None
    version = None if mask.is_inference() else mask._version
    known = getattr(mask, "_qlora_key_ranges", None)
    if known is None or known[0] != version or version is None:
        known = (version, _ranges_of(mask[:, 0]))
        mask._qlora_key_ranges = known  # type: ignore[attr-defined]
    ranges: KeyRanges | None = known[1]
    if ranges is None:
        return None
    starts, ends = (tensor.expand(batch, -1).contiguous() for tensor in ranges)
    return starts, ends


def _ranges_of(visible: Tensor) -> KeyRanges | None:
    """Compute the ranges of a boolean [batch, Tq, Tk] without a copy of it in a wider dtype."""
    if visible.shape[-1] == 0:
        return None
    count = visible.sum(-1)
    starts = torch.where(count > 0, visible.view(torch.uint8).argmax(-1), 0)
    last = visible.shape[-1] - 1 - visible.flip(-1).view(torch.uint8).argmax(-1)
    # A row is a range if its number of keys equals the distance from its first to its last key plus one.
    if not bool(((last - starts + 1 == count) | (count == 0)).all()):
        return None
    return starts, starts + count


def _library_is_quick() -> bool:
    return unavailable("cpu") is None and torch.ops.qlora_kernels_C.cpu_isa(None) in _MEASURED_SETS
