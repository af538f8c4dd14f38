"""The launchers' argument structs (csrc/cuda/launchers.h) for the emulator, built from tensors and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.format.quant_state import DTYPE_CODES
from tests.support.cuda_host import out, pointers, shifted, struct_of

MULTIPROCESSORS = 108
"""Of the GPU that the launchers plan for."""

Members = tuple[str, tuple[Any, ...]]
"""A format string of `struct_of`, and its items."""


def nf4_weight(packed: Tensor | None, constants: Sequence[Tensor | None], blocksize: int, N: int, K: int) -> Members:
    """Return struct NF4Weight. constants: absmax, absmax_q, absmax_scale, absmax_offset."""
    return "PPPPPqqi0q", (packed, *constants, N, K, blocksize.bit_length() - 1)


def any_float(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Members:
    """Return struct AnyFloat."""
    return "Pi0q", (tensor, dtype_code(dtype if tensor is None else tensor.dtype))


def dtype_code(dtype: torch.dtype | int | None) -> int:
    """Return the value of enum DType; an int is returned unchanged."""
    return dtype if isinstance(dtype, int) else DTYPE_CODES[dtype or torch.float32]


def dequantize_args(weight: Members, w: Tensor | None, dtype: torch.dtype | int, row_stride: int = 0) -> struct_of:
    """Return struct DequantizeNF4Args. w: all memory from the first element on, where its rows have a stride."""
    return _struct(weight, ("Pqi", (None if w is None else out(w), row_stride, dtype_code(dtype))))


def lora_down_args(
    x: Tensor,
    lora_A: Tensor,
    dropout: tuple[Tensor | None, int, float],
    s: tuple[Tensor, int],
    copy: tuple[Tensor | None, int],
    *,
    M: int | None = None,
) -> struct_of:
    """Return struct LoraDownArgs. dropout: seed, threshold, scale.   s, copy: memory and row stride."""
    seed, threshold, scale = dropout
    memory = (x, lora_A, seed, out(s[0]), s[1], None if copy[0] is None else out(copy[0]), copy[1])
    sizes = (dtype_code(x.dtype), x.shape[0] if M is None else M, x.shape[1], lora_A.shape[0], threshold, scale)
    return _struct(("PPPPqPqiqiiif", (*memory, *sizes)))


def merge_lora_args(weight: Members, lora_A: Tensor, lora_B: Tensor, scaling: float, w: Tensor) -> struct_of:
    """Return struct MergeLoraArgs. lora_A: [K, r]."""
    return _struct(weight, ("PPPiif", (lora_A, lora_B, out(w), dtype_code(w.dtype), lora_B.shape[1], scaling)))


def rows_memory(rows: Tensor) -> tuple[Tensor, int]:
    """Return the memory of a matrix whose rows have a stride, from its first to its last element, and the stride."""
    M, columns = rows.shape
    memory = rows.as_strided(((M - 1) * rows.stride(0) + columns,), (1,), rows.storage_offset())
    return memory, rows.stride(0)


def quantize_args(w: Tensor, blocksize: int, packed: Tensor, absmax: Tensor, partial_sums: Tensor | None) -> struct_of:
    """Return struct QuantizeNF4Args."""
    outputs = (out(packed), out(absmax), None if partial_sums is None else out(partial_sums))
    return _struct(("PiiqPPP", (w, dtype_code(w.dtype), blocksize.bit_length() - 1, w.numel(), *outputs)))


def quantize_absmax_args(
    absmax: Tensor, partial_sums: Tensor, absmax_q: Tensor, absmax_scale: Tensor, absmax_offset: Tensor
) -> struct_of:
    """Return struct QuantizeAbsmaxArgs."""
    outputs = (out(absmax_q), out(absmax_scale), out(absmax_offset))
    return _struct(("PqPqPPP", (absmax, absmax.numel(), partial_sums, partial_sums.numel(), *outputs)))


def small_m_args(
    x: Tensor, weight: Members, bias: Tensor | None, lora: tuple[Tensor | None, Tensor | None, float], y: Tensor, M: int
) -> struct_of:
    """Return struct LinearNF4SmallMArgs. lora: s, lora_B, scaling."""
    s, lora_B, scaling = lora
    sizes = (out(y), dtype_code(x.dtype), M, 0 if s is None else s.shape[1], scaling, MULTIPROCESSORS)
    return _struct(("P", (x,)), weight, any_float(bias), ("P", (s,)), any_float(lora_B), ("Piiifi", sizes))


def pairs_args(
    x: Tensor, weight: Members, bias: Tensor | None, lora: tuple[Tensor | None, Tensor | None, float], y: Tensor, M: int
) -> struct_of:
    """Return struct LinearNF4PairsArgs. lora: s, lora_B, scaling."""
    s, lora_B, scaling = lora
    sizes = (out(y), M, 0 if s is None else s.shape[1], scaling, MULTIPROCESSORS)
    return _struct(("P", (x,)), weight, any_float(bias), ("PP", (s, lora_B)), ("Piifi", sizes))


def gemm_args(
    x: Tensor,
    weight: Members,
    bias: Tensor | None,
    lora: tuple[Tensor | None, Tensor | None, float],
    y: Tensor,
    partial: Tensor | None = None,
    *,
    transposed: bool,
) -> struct_of:
    """Return struct LinearNF4GemmArgs. lora: lora_left, lora_right, scaling."""
    left, right, scaling = lora
    splits = 1 if partial is None else partial.shape[0]
    memory = (left, right, out(y), None if partial is None else out(partial))
    numbers = (dtype_code(x.dtype), x.shape[0], 0 if left is None else left.shape[1], scaling, splits, int(transposed))
    return _struct(("P", (x,)), weight, any_float(bias), ("PPPPiiifii", (*memory, *numbers)))


def _inside(tensor: Tensor, *, written: bool = False) -> Tensor | out | shifted:
    """Return the argument for a tensor, which may be a view that begins inside the memory of another one."""
    whole = tensor if tensor._base is None else tensor._base
    argument = out(whole) if written else whole
    return shifted(argument, tensor.storage_offset() * tensor.element_size()) if tensor.storage_offset() else argument


def dropout_args(x: Tensor, y: Tensor, threshold: int, scale: float, add: bool, seed: Tensor) -> struct_of:
    """Return struct DropoutArgs. x, y: may be views that begin inside the memory of another tensor."""
    return _struct(
        (
            "PPiifiPq",
            (_inside(x), _inside(y, written=True), dtype_code(x.dtype), threshold, scale, int(add), seed, x.numel()),
        )
    )


def adamw_args(
    table: pointers,
    segments: Tensor,
    steps: Tensor,
    arena: Tensor,
    lr: Tensor,
    optional: tuple[Tensor | None, Tensor | None, Tensor | None],
    scalars: Sequence[float],
    largest_segment: int,
) -> struct_of:
    """Return struct AdamWArgs. optional: seed, grad_multiplier, found_inf.   scalars: beta1, beta2, eps, weight_decay,
    lr."""
    plan = (table, steps.numel(), segments, len(segments), steps, out(arena), arena.numel())
    rate = ("P", (lr,)) if lr.dtype == torch.float64 else ("P", (None,))
    return _struct(
        ("PqPqPPq", plan),
        any_float(None if lr.dtype == torch.float64 else lr),
        rate,
        ("PPP", optional),
        ("dddddq", (*scalars, largest_segment)),
    )


def _struct(*members: Members) -> struct_of:
    return struct_of("".join(form for form, _ in members), tuple(item for _, items in members for item in items))
