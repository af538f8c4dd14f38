"""The kernel contracts of ops/<op>.py, implemented by the library's private ops qlora_kernels_C::cpu_*."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.attention import Keys
from ...ops.operands import GroupLoRA, LoRA, Needs, Weight, WeightLists
from ...ops.output_head import Head
from ...ops.tensor_memory import contiguous

_C = torch.ops.qlora_kernels_C


def quantize_nf4(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return (packed, absmax) of a contiguous w."""
    packed, absmax = _C.cpu_quantize_nf4(w, blocksize)
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (absmax_q, absmax_scale, absmax_offset); torch computes the mean, whose summation order is the
    format's.
    """
    absmax_q, absmax_scale, absmax_offset = _C.cpu_quantize_absmax(absmax)
    return absmax_q, absmax_scale, absmax_offset


def quantize_nf4_double(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (packed, absmax, absmax_q, absmax_scale, absmax_offset) of a contiguous w."""
    packed, absmax, absmax_q, absmax_scale, absmax_offset = _C.cpu_quantize_nf4_double(w, blocksize)
    return packed, absmax, absmax_q, absmax_scale, absmax_offset


def dequantize_nf4(weight: Weight, *, out: Tensor) -> None:
    """Write the dequantized weight into `out`, which is contiguous."""
    _C.cpu_dequantize_nf4(weight.packed, *weight.constants, weight.blocksize, out)


def linear_nf4(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return y [M, N] = x W^T + bias in x's dtype."""
    y: Tensor = _C.cpu_linear_nf4(x, weight.packed, *weight.constants, _contiguous(bias), weight.blocksize, weight.N)
    return y


def linear_nf4_grad_x(grad_y: Tensor, weight: Weight) -> Tensor:
    """Return grad_x [M, K] = grad_y W in grad_y's dtype."""
    grad_x: Tensor = _C.cpu_linear_nf4_grad_x(grad_y, weight.packed, *weight.constants, weight.blocksize, weight.K)
    return grad_x


def linear_nf4_lora(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> tuple[Tensor, Tensor]:
    """Return (y [M, N], s [M, r])."""
    y, s = _C.cpu_linear_nf4_lora(
        x, weight.packed, *weight.constants, _contiguous(bias), *lora, weight.blocksize, weight.N
    )
    return y, s


def linear_nf4_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Weight,
    lora: LoRA,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x, grad_A, grad_B), empty if not needed; the library computes those of factors in fp32."""
    grad_x, grad_A, grad_B = _C.cpu_linear_nf4_lora_backward(
        grad_y, x, s, weight.packed, *weight.constants, *lora, weight.blocksize, *needs
    )
    if lora.A.dtype != torch.float32 or lora.B.dtype != torch.float32:
        grad_A, grad_B = grad_A.to(lora.A.dtype), grad_B.to(lora.B.dtype)
    return grad_x, grad_A, grad_B


def linear_nf4_lora_group(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], lora: GroupLoRA
) -> tuple[list[Tensor], Tensor]:
    """Return ([y_i [M, N_i]], s [M, sum of r_i]); r_i may be 0."""
    lists = WeightLists.of(weights)
    ys, s = _C.cpu_linear_nf4_lora_group(
        x, *lists[:5], [_contiguous(bias) for bias in biases], *lora, lists.blocksizes, lists.N
    )
    return ys, s


def linear_nf4_lora_group_backward(
    grad_ys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    weights: Sequence[Weight],
    lora: GroupLoRA,
    needs: Needs,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (grad_x, grad_A, grads of B), empty if not needed; the library computes those of factors in fp32."""
    lists = WeightLists.of(weights)
    grad_x, grad_A, grads_B = _C.cpu_linear_nf4_lora_group_backward(
        grad_ys, x, s, *lists[:5], *lora, lists.blocksizes, *needs
    )
    if all(factor.dtype == torch.float32 for factor in (lora.A, *lora.B)):  # a call of `.to` takes a microsecond
        return grad_x, grad_A, grads_B
    grads_B = [grad_B.to(B.dtype) for grad_B, B in zip(grads_B, lora.B, strict=True)]
    return grad_x, grad_A.to(lora.A.dtype), grads_B


def linear_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Head, *, need_grad_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses [M], log_sums [M], rows [M, K] or empty)."""
    losses, log_sums, rows = _C.cpu_linear_cross_entropy(
        hidden,
        head.weight,
        head.absmax,
        head.absmax_q,
        head.absmax_scale,
        head.absmax_offset,
        head.blocksize,
        head.V,
        head.low_rank,
        head.bias,
        labels,
        head.ignore_index,
        head.logit_scale,
        head.softcap,
        need_grad_hidden,
    )
    return losses, log_sums, rows


def attention(q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Return (out [B, Tq, H, D], log_sums [B, H, Tq])."""
    out, log_sums = _C.cpu_attention(q, k, v, *keys)
    return out, log_sums


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, keys: Keys
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_q [B, Tq, H, D], grad_k and grad_v [B, Tk, KV, D])."""
    grad_q, grad_k, grad_v = _C.cpu_attention_backward(grad_out, q, k, v, out, log_sums, *keys)
    return grad_q, grad_k, grad_v


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else contiguous("linear_nf4", bias)
