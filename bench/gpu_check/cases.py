"""The calls that the check compares with the CPU: every op of the GPU backends except those of codec and optimizer.

A case is a function of a device, a dtype and sizes, which returns the op's results and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.ops.operands import LoRA, weight_of


@dataclass(frozen=True)
class Sizes:
    """Rows of x, the weight's shape [N, K], the rank, and the probability of dropout."""

    M: int
    N: int = 520
    K: int = 1024
    r: int = 16
    p: float = 0.0


TINY_SIZES = Sizes(16, 64, 128)
"""Sizes of a rehearsal, for which the fake device's tests compile Triton's kernels too."""

Case = Callable[[str, torch.dtype, Sizes], Sequence[Tensor]]


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal values from a seed, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_on(device: str, sizes: Sizes) -> tuple[Tensor, qk.QuantState]:
    """Return a quantized weight of these sizes, with the same bytes on every device."""
    with qk.use_backend("reference"):
        packed, state = qk.quantize_nf4(gaussian(sizes.N, sizes.K, seed=2) / sizes.K**0.5)
    return packed.to(device), state.to(device)


def leaf(device: str, values: Tensor) -> Tensor:
    """Return a copy of the values on a device that requires a gradient."""
    return values.to(device, copy=True).requires_grad_()


def gradients(y: Tensor, leaves: Sequence[Tensor], seed: int = 8) -> list[Tensor]:
    """Return the gradients of sum(y * g) for normal values g."""
    return list(torch.autograd.grad(y, leaves, gaussian(*y.shape, seed=seed, dtype=y.dtype).to(y.device)))


def factors(dtype: torch.dtype, sizes: Sizes, *leading: int) -> tuple[Tensor, Tensor]:
    """Return LoRA factors A and B, fp32 masters of values in the dtype."""
    A = gaussian(*leading, sizes.r, sizes.K, seed=4) / sizes.K**0.5
    return A.to(dtype).float(), gaussian(*leading, sizes.N, sizes.r, seed=5).to(dtype).float()


def linear(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """Return y and the gradients of a linear without an adapter."""
    x = leaf(device, gaussian(sizes.M, sizes.K, seed=3, dtype=dtype))
    bias = leaf(device, gaussian(sizes.N, seed=6, dtype=dtype))
    y = qk.linear_nf4(x, *weight_on(device, sizes), bias)
    return [y.detach(), *gradients(y, (x, bias))]


def lora(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """Return y and all gradients of one LoRA linear."""
    x = leaf(device, gaussian(sizes.M, sizes.K, seed=3, dtype=dtype))
    A, B = (leaf(device, factor) for factor in factors(dtype, sizes))
    bias = leaf(device, gaussian(sizes.N, seed=6, dtype=dtype))
    adapter = LoRA(A, B, torch.tensor([7], device=device), 0.5, sizes.p)
    y, _ = torch.ops.qlora_kernels.linear_nf4_lora(
        x, *weight_of("gpu_check", *weight_on(device, sizes)), bias, *adapter
    )
    return [y.detach(), *gradients(y, (x, A, B, bias))]


def group(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """Return the two results of a group of LoRA linears on one x, and all gradients."""
    x = leaf(device, gaussian(sizes.M, sizes.K, seed=3, dtype=dtype))
    packed, state = weight_on(device, sizes)
    A, B = factors(dtype, sizes)
    As, Bs = [leaf(device, A), leaf(device, A.flip(0))], [leaf(device, B), leaf(device, B.flip(0))]
    ys = qk.linear_nf4_lora_group(x, [packed] * 2, [state] * 2, As, Bs, scalings=[0.5, 2.0])
    y = torch.cat(list(ys), dim=1)
    return [y.detach(), *gradients(y, (x, *As, *Bs))]


def merged_lora(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """y and all gradients of a LoRA linear whose update is added to the weight while it is decoded."""
    x = leaf(device, gaussian(sizes.M, sizes.K, seed=3, dtype=dtype))
    A, B = (leaf(device, factor) for factor in factors(dtype, sizes))
    bias = leaf(device, gaussian(sizes.N, seed=6, dtype=dtype))
    operands = (*weight_of("gpu_check", *weight_on(device, sizes)), bias, *LoRA(A, B, None, 0.5, 0.0))
    y = torch.ops.qlora_kernels.linear_nf4_lora_merged(x, *operands)
    return [y.detach(), *gradients(y, (x, A, B, bias))]


def multi_lora(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """Return y and the gradients of a linear whose rows use three adapters or none."""
    x = leaf(device, gaussian(sizes.M, sizes.K, seed=3, dtype=dtype))
    A, B = (leaf(device, factor) for factor in factors(dtype, sizes, 3))
    scalings = torch.tensor([0.5, 1.0, 2.0]).to(device)
    adapter = (torch.arange(sizes.M) % 4 - 1).to(device)
    y = qk.linear_nf4_multi_lora(x, *weight_on(device, sizes), A, B, scalings, adapter)
    return [y.detach(), *gradients(y, (x, A, B))]


def rms_norm(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """Return y, the sum with the residual, and the gradients."""
    x, residual = (leaf(device, gaussian(sizes.M, sizes.K, seed=seed, dtype=dtype)) for seed in (3, 4))
    weight = leaf(device, gaussian(sizes.K, seed=5, dtype=dtype))
    y, s = qk.rms_norm(x, weight, 1e-5, residual=residual)
    return [y.detach(), s.detach(), *gradients(y, (x, residual, weight))]


def rope(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """Return rotated q and k, and the gradient of q."""
    width = 64
    q, k = (
        leaf(device, gaussian(1, heads, sizes.M, width, seed=heads, dtype=dtype)) for heads in (sizes.K // width, 1)
    )
    angles = gaussian(1, sizes.M, width // 2, seed=9).repeat(1, 1, 2)
    rotated_q, rotated_k = qk.rope(q, k, angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device))
    return [rotated_q.detach(), rotated_k.detach(), *gradients(rotated_q, (q,))]


def glu(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """Return silu(gate) * up and its gradients."""
    gate, up = (leaf(device, gaussian(sizes.M, sizes.K, seed=seed, dtype=dtype)) for seed in (3, 4))
    y = qk.glu(gate, up, "silu")
    return [y.detach(), *gradients(y, (gate, up))]


def cross_entropy(device: str, dtype: torch.dtype, sizes: Sizes) -> Sequence[Tensor]:
    """Return the loss of each row over a vocabulary of N, and the gradient of the hidden states."""
    hidden = leaf(device, gaussian(sizes.M, sizes.K, seed=3, dtype=dtype))
    head = (gaussian(sizes.N, sizes.K, seed=4) / sizes.K**0.5).to(dtype).to(device)
    labels = (torch.arange(sizes.M) * 7 % sizes.N).to(device)
    losses = qk.linear_cross_entropy(hidden, head, labels, reduction="none")
    return [losses.detach(), *gradients(losses, (hidden,))]


CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "linear": (linear, ("linear_nf4", "linear_nf4_grad_x")),
    "lora": (lora, ("linear_nf4_lora", "linear_nf4_lora_backward")),
    "group": (group, ("linear_nf4_lora_group", "linear_nf4_lora_group_backward")),
    "merged_lora": (merged_lora, ("linear_nf4_lora_merged", "linear_nf4_lora_merged_backward")),
    "multi_lora": (multi_lora, ("linear_nf4_multi_lora", "linear_nf4_multi_lora_backward")),
    "rms_norm": (rms_norm, ("rms_norm", "rms_norm_backward")),
    "rope": (rope, ("rope",)),
    "glu": (glu, ("glu", "glu_backward")),
    "cross_entropy": (cross_entropy, ("linear_cross_entropy",)),
}
"""Case -> the ops that it runs."""

ELSEWHERE = ("quantize_nf4", "quantize_nf4_double", "quantize_absmax", "dequantize_nf4", "adamw_step")
"""Ops that are checked by the codec's comparison and the paging step."""


def cases_of(ops: Sequence[str]) -> list[str]:
    """Return the names of the cases for a backend with these ops. Raises LookupError for an op without a check."""
    checked = {op for _, run in CASES.values() for op in run} | set(ELSEWHERE)
    if unchecked := [op for op in ops if op not in checked and not op.startswith(("managed_", "page_locked_"))]:
        raise LookupError(f"gpu_check: no case for {', '.join(unchecked)}; add one to bench/gpu_check/cases.py")
    return [name for name, (_, run) in CASES.items() if set(run) <= set(ops)]
