"""linear_cross_entropy over chunks of tokens: torch's matmuls, and one kernel for softmax, loss and gradient.

The fp32 logits of a chunk take at most CHUNK_BYTES. The kernel writes the gradient of the logits in hidden's dtype, as
the left operand of the second matmul. A kernel that includes the second product would have to accumulate K columns of
the gradient for each of its tokens over the whole vocabulary; at a hidden size of 4096 neither registers nor shared
memory can hold them.
"""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.output_head import Head
from ...rounding import next_power_of_2
from .launch import launchable

CHUNK_BYTES = 256 << 20
"""Bytes of a chunk's fp32 logits: 512 tokens of a vocabulary of 128k."""

BLOCK = 4096
NUM_WARPS = 16
"""With 8, two words are spilled on sm_100."""


@triton.jit
def _transformed(z, bias, logit_scale, softcap, SOFTCAP: tl.constexpr):
    z = (z + bias) * logit_scale
    if SOFTCAP:
        z = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * (z / softcap))))
    return z


@launchable
@triton.jit
def cross_entropy_rows_kernel(
    p_z,
    p_bias,
    p_labels,
    p_losses,
    p_log_sums,
    p_out,
    V,
    ignore_index,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the loss and log-sum-exp of one row of products [V]; out = the gradient with respect to the products.

    Each lane keeps its own maximum and the sum relative to it; the lanes are merged once at the end. A label that is
    neither in the vocabulary nor ignored gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + row)
    learned = label != ignore_index
    is_valid = (label >= 0) & (label < V)
    p_row = p_z + row * V
    lanes = tl.arange(0, BLOCK)

    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        inside = columns < V
        z = tl.load(p_row + columns, mask=inside, other=0.0)
        bias = tl.load(p_bias + columns, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        z = tl.where(inside, _transformed(z, bias, logit_scale, softcap, SOFTCAP), -float("inf"))
        higher = tl.maximum(top, z)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.exp(z - base)
        top = higher
    highest = tl.max(top, axis=0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    log_sum = base + tl.log(tl.sum(total * tl.exp(top - base), axis=0))

    z_label = tl.load(p_row + label, mask=is_valid, other=0.0)
    b_label = tl.load(p_bias + label, mask=is_valid, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    z_label = _transformed(z_label, b_label, logit_scale, softcap, SOFTCAP)
    loss = tl.where(is_valid, log_sum - z_label, float("nan"))
    tl.store(p_losses + row, tl.where(learned, loss, 0.0))
    tl.store(p_log_sums + row, log_sum)

    if NEED_GRAD:
        for start in range(0, V, BLOCK):
            columns = start + lanes
            inside = columns < V
            z = tl.load(p_row + columns, mask=inside, other=0.0)
            bias = tl.load(p_bias + columns, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
            z = _transformed(z, bias, logit_scale, softcap, SOFTCAP)
            grad = tl.exp(z - log_sum) - tl.where(columns == label, 1.0, 0.0)
            if SOFTCAP:
                t = z / softcap
                grad = grad * (1.0 - t * t)
            grad = tl.where(learned, tl.where(is_valid, grad * logit_scale, float("nan")), 0.0)
            tl.store(p_out + row * V + columns, grad.to(p_out.dtype.element_ty), mask=inside)


def linear_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Head, *, need_grad_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses, log_sums, rows). See ops/linear_cross_entropy.py for the contract."""
    M, V = hidden.shape[0], head.V
    if head.nf4 is None:
        head = head._replace(weight=head.weight.to(hidden.dtype))
    losses = hidden.new_empty(M, dtype=torch.float32)
    log_sums = torch.empty_like(losses)
    rows = torch.empty_like(hidden) if need_grad_hidden else hidden.new_empty(0)
    chunk = min(M, max(1, CHUNK_BYTES // (4 * V)))
    grad_logits = hidden.new_empty((chunk, V)) if need_grad_hidden else hidden
    for start in range(0, M, chunk):
        stop = min(start + chunk, M)
        products = _products(hidden[start:stop], head)
        cross_entropy_rows_kernel[(stop - start,)](
            products,
            products if head.bias is None else head.bias,
            labels[start:stop],
            losses[start:stop],
            log_sums[start:stop],
            grad_logits,
            V,
            head.ignore_index,
            head.logit_scale,
            head.softcap,
            HAS_BIAS=head.bias is not None,
            SOFTCAP=head.softcap != 0.0,
            NEED_GRAD=need_grad_hidden,
            BLOCK=min(BLOCK, next_power_of_2(V)),
            num_warps=NUM_WARPS,
        )
        if need_grad_hidden:
            _products_with_weight(grad_logits[: stop - start], head, out=rows[start:stop])
    return losses, log_sums, rows


def _products(hidden: Tensor, head: Head) -> Tensor:
    """Return hidden @ weight.T in fp32, by one product for a dense head and by one for each part of an NF4 head."""
    products = None
    for columns, weight in head.parts(hidden.dtype):
        part = _in_fp32(hidden, weight.T)
        if part.shape[1] == head.V:
            return part
        if products is None:
            products = hidden.new_empty((hidden.shape[0], head.V), dtype=torch.float32)
        products[:, columns] = part
    return cast(Tensor, products)


def _products_with_weight(grad_logits: Tensor, head: Head, *, out: Tensor) -> None:
    """Compute out = grad_logits @ weight, rounded once."""
    total = None
    for columns, weight in head.parts(grad_logits.dtype):
        if columns.stop - columns.start == head.V:
            torch.mm(grad_logits, weight, out=out)
            return
        product = _in_fp32(grad_logits[:, columns], weight)
        total = product if total is None else total.add_(product)
    out.copy_(cast(Tensor, total))


def _in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
