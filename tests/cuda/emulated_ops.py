"""CPU implementations of the CUDA library's private ops that call its launchers in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.support.cuda_host import out

from .launch_args import (
    MULTIPROCESSORS,
    dequantize_args,
    dropout_args,
    gemm_args,
    lora_down_args,
    merge_lora_args,
    nf4_weight,
    pairs_args,
    quantize_absmax_args,
    quantize_args,
    rows_memory,
    small_m_args,
)
from .launching import library


def launch(stem: str, name: str, *arguments: Any) -> None:
    assert library(stem, "plain").call(name, *arguments) == 0


def emulate_dequantize(packed: Tensor, *rest: Any) -> None:
    *constants, blocksize, w = rest
    (N, K), (memory, stride) = ((1, w.numel()), (w, 0)) if w.is_contiguous() else (w.shape, rows_memory(w))
    weight = nf4_weight(packed, constants, blocksize, N, K)
    launch("dequantize_nf4", "launch_dequantize_nf4", dequantize_args(weight, memory, w.dtype, stride), None)


def emulate_quantize(w: Tensor, blocksize: int, packed: Tensor, absmax: Tensor) -> None:
    launch("quantize_nf4", "launch_quantize_nf4", quantize_args(w, blocksize, packed, absmax, None), None)


def emulate_quantize_absmax(absmax: Tensor, sums: Tensor, q: Tensor, scale: Tensor, offset: Tensor) -> None:
    launch("quantize_nf4", "launch_sum_absmax", absmax, out(sums), absmax.numel(), None)
    launch("quantize_nf4", "launch_quantize_absmax", quantize_absmax_args(absmax, sums, q, scale, offset), None)


def emulate_quantize_double(
    w: Tensor, blocksize: int, packed: Tensor, absmax: Tensor, sums: Tensor, *rest: Any
) -> None:
    launch("quantize_nf4", "launch_quantize_nf4", quantize_args(w, blocksize, packed, absmax, sums), None)
    launch("quantize_nf4", "launch_quantize_absmax", quantize_absmax_args(absmax, sums, *rest), None)


def emulate_small_m(x: Tensor, packed: Tensor, *rest: Any) -> None:
    *constants, bias, s, B, scaling, blocksize, multiprocessors, y = rest
    assert multiprocessors == MULTIPROCESSORS
    weight = nf4_weight(packed, constants, blocksize, y.shape[1], x.shape[1])
    arguments = small_m_args(x, weight, bias, (s, B, float(scaling)), y, x.shape[0])
    launch("linear_nf4_small_m", "launch_linear_nf4_small_m", arguments, None)


def emulate_pairs(x: Tensor, packed: Tensor, *rest: Any) -> None:
    *constants, bias, s, B, scaling, blocksize, multiprocessors, y = rest
    assert multiprocessors == MULTIPROCESSORS
    weight = nf4_weight(packed, constants, blocksize, y.shape[1], x.shape[1])
    arguments = pairs_args(x, weight, bias, (s, B, float(scaling)), y, x.shape[0])
    launch("linear_nf4_pairs", "launch_linear_nf4_pairs", arguments, None)


def emulate_gemm(x: Tensor, packed: Tensor, *rest: Any, stem: str = "linear_nf4_gemm") -> None:
    *constants, bias, left, right, scaling, blocksize, transposed, partial, y = rest
    N, K = (x.shape[1], y.shape[1]) if transposed else (y.shape[1], x.shape[1])
    weight, lora = nf4_weight(packed, constants, blocksize, N, K), (left, right, float(scaling))
    arguments = gemm_args(x, weight, bias, lora, y, partial, transposed=transposed)
    launch(stem, f"launch_{stem}", arguments, None)


def emulate_wgmma(x: Tensor, packed: Tensor, *rest: Any) -> None:
    emulate_gemm(x, packed, *rest, stem="linear_nf4_wgmma")


def emulate_dropout(x: Tensor, seed: Tensor, threshold: int, scale: float, add: bool, y: Tensor) -> None:
    launch("dropout", "launch_dropout", dropout_args(x, y, threshold, float(scale), add, seed), None)


def emulate_lora_down(
    x: Tensor, lora_A: Tensor, seed: Tensor | None, threshold: int, scale: float, s: Tensor, copy: Tensor | None
) -> None:
    copied = (None, 0) if copy is None else rows_memory(copy)
    arguments = lora_down_args(x, lora_A, (seed, threshold, float(scale)), rows_memory(s), copied)
    launch("lora_down", "launch_lora_down", arguments, None)


def emulate_merge_lora(packed: Tensor, *rest: Any) -> None:
    *constants, A, B, scaling, blocksize, w = rest
    arguments = merge_lora_args(nf4_weight(packed, constants, blocksize, *w.shape), A, B, float(scaling), w)
    launch("merge_lora", "launch_merge_lora", arguments, None)


@contextmanager
def emulated_ops() -> Iterator[None]:
    """Register the implementations for CPU tensors while the context is open."""
    implementations = torch.library.Library("qlora_kernels_C", "IMPL", "CPU")
    for name, function in {
        "cuda_dequantize_nf4": emulate_dequantize,
        "cuda_quantize_nf4": emulate_quantize,
        "cuda_quantize_absmax": emulate_quantize_absmax,
        "cuda_quantize_nf4_double": emulate_quantize_double,
        "cuda_linear_nf4_small_m": emulate_small_m,
        "cuda_linear_nf4_pairs": emulate_pairs,
        "cuda_linear_nf4_gemm": emulate_gemm,
        "cuda_linear_nf4_wgmma": emulate_wgmma,
        "cuda_dropout": emulate_dropout,
        "cuda_lora_down": emulate_lora_down,
        "cuda_merge_lora": emulate_merge_lora,
    }.items():
        implementations.impl(name, function)
    try:
        yield
    finally:
        implementations._destroy()
