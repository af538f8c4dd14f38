"""Weights from fixed seeds, and copies of one layer of each implementation.

Every implementation has the same quantized weight: bitsandbytes quantizes the tensor that ours quantizes, and dense
layers have our dequantized weight. The copies exceed the last-level cache several times and are kept for the next case
of the same shape, because building them takes longer than timing them.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import qlora_kernels as qk
from qlora_kernels.format.quant_state import n_blocks
from qlora_kernels.ops.registry import use_backend

from .registry import Case

LORA_ALPHA = 32


def gaussian(*size: int, dtype: torch.dtype, device: str, seed: int, std: float = 1.0) -> Tensor:
    """Return normally distributed numbers from a separate generator."""
    numbers = torch.randn(*size, generator=torch.Generator().manual_seed(seed))
    return numbers.mul_(std).to(device=device, dtype=dtype)


@lru_cache(maxsize=1)
def source_weight(N: int, K: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return W [N, K] before quantization."""
    return gaussian(N, K, dtype=dtype, device=device, seed=1, std=0.02)


@lru_cache(maxsize=1)
def quantized(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str) -> qk.LinearNF4:
    """Return our layer of that weight."""
    dense = nn.Linear(K, N, bias=False, device="meta")
    dense.weight = nn.Parameter(source_weight(N, K, dtype, device), requires_grad=False)
    return qk.LinearNF4.from_linear(dense, blocksize=blocksize)


@lru_cache(maxsize=1)
def dequantized(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return the dequantized W [N, K] in `dtype`, by the reference."""
    with use_backend("reference"):
        return quantized(N, K, blocksize, dtype, device).dequantize(dtype)


def lora_factors(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return lora_A [r, K] and lora_B [N, r]; their update is a few per cent of the layer's output."""
    lora_A = gaussian(case.r, case.K, dtype=dtype, device=case.device, seed=2, std=case.K**-0.5)
    lora_B = gaussian(case.N, case.r, dtype=dtype, device=case.device, seed=3, std=0.02)
    return lora_A, lora_B


@lru_cache(maxsize=1)
def ours(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str, copies: int) -> list[qk.LinearNF4]:
    """Return `copies` copies of our layer."""
    layer = quantized(N, K, blocksize, dtype, device)
    return [copy.deepcopy(layer) for _ in range(copies)]


@lru_cache(maxsize=1)
def dense(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str, copies: int) -> list[nn.Linear]:
    """Return `copies` frozen nn.Linear layers of the dequantized weight."""
    weight = dequantized(N, K, blocksize, dtype, device)
    layers = []
    for _ in range(copies):
        layer = nn.Linear(K, N, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        layers.append(layer)
    return layers


@lru_cache(maxsize=1)
def bitsandbytes_eval(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str, copies: int) -> list[nn.Module]:
    """Return Linear4bit in eval mode; on an AVX512-BF16 CPU its first call repacks it for its fused kernel."""
    layer = copy.deepcopy(_linear4bit(N, K, blocksize, dtype, device)).eval()
    with torch.no_grad():
        layer(torch.zeros(1, K, dtype=dtype, device=device))
    return [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]  # repacking takes far longer than copying


@lru_cache(maxsize=1)
def bitsandbytes_train(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str, copies: int) -> list[nn.Module]:
    """Return Linear4bit in training mode, which dequantizes the weight and multiplies with torch."""
    layers = [copy.deepcopy(_linear4bit(N, K, blocksize, dtype, device)).train() for _ in range(copies)]
    return [trainable(layer) for layer in layers]


def trainable(layer: nn.Module) -> nn.Module:
    """Keep a Linear4bit from using its CPU kernel, after whose first run it gives no gradient."""
    setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010, an attribute that nn.Module does not declare
    return layer


@lru_cache(maxsize=1)
def _linear4bit(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str) -> nn.Module:
    return linear4bit(source_weight(N, K, dtype, device), blocksize)


def linear4bit(weight: Tensor, blocksize: int = 64) -> nn.Module:
    """Return bitsandbytes' layer of a dense weight [N, K], double-quantized."""
    bnb = bitsandbytes()
    N, K = weight.shape
    options = {"quant_type": "nf4", "compress_statistics": True}
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, device="meta", **options)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, blocksize=blocksize, **options)
    moved: nn.Module = layer.to(weight.device)
    return moved


def with_peft(layers: Sequence[nn.Module], case: Case, adapter_dtype: torch.dtype) -> list[nn.Module]:
    """Return Hugging Face PEFT's LoRA around each layer, with lora_factors' values in `adapter_dtype`."""
    import peft

    config = peft.LoraConfig(
        r=case.r, lora_alpha=LORA_ALPHA, lora_dropout=case.dropout, target_modules=r"\d+", init_lora_weights=False
    )
    stack = peft.inject_adapter_in_model(config, nn.Sequential(*map(copy.copy, layers)))
    for layer in stack:
        for factor, value in zip((layer.lora_A, layer.lora_B), lora_factors(case, adapter_dtype), strict=True):
            factor["default"].weight = nn.Parameter(value.clone())
    return list(stack.train())


def nf4_bytes(case: Case) -> int:
    """Return the bytes of a double-quantized weight: indices, 8-bit constants, their scales."""
    blocks = n_blocks(case.N * case.K, case.blocksize)
    return (case.N * case.K + 1) // 2 + blocks + 4 * n_blocks(blocks, 256)


def dense_bytes(case: Case) -> int:
    """Return the bytes of the weight in the case's dtype."""
    return case.N * case.K * case.dtype.itemsize


def blocks_end_with_rows(case: Case) -> bool:
    """Whether no block straddles two rows; bitsandbytes' CPU code decodes such weights wrongly."""
    return case.K % case.blocksize == 0


def bitsandbytes() -> Any:
    """Import the package without the output that it prints at its first import."""
    with contextlib.redirect_stdout(sys.stderr):
        import bitsandbytes as bnb
    return bnb
