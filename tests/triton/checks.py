"""Comparisons of Triton kernels with definitions, which the tests of planted faults run too."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

import qlora_kernels as qk
from qlora_kernels.backends.triton import lora_grads, planner
from qlora_kernels.backends.triton.dequantize_nf4 import dequantize_nf4
from qlora_kernels.backends.triton.linear_nf4_lora_group import linear_nf4_lora_group, linear_nf4_lora_group_backward
from qlora_kernels.backends.triton.linear_nf4_lora_merged import merge_lora
from qlora_kernels.backends.triton.lora_grads import lora_ds_grad_B, passes_over_grad_y
from qlora_kernels.backends.triton.planner import ARCHS, Plan, use_plan
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops.operands import GroupLoRA, LoRA, Needs, Weight, weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import (
    Arithmetic,
    Dropout,
    arithmetic_of,
    lora_backward,
    lora_down,
    lora_forward,
    merged_weight,
)
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within


def quantized(N, K, seed=0, blocksize=64, double=True):
    packed, absmax = reference.quantize_nf4(gaussian(N, K, seed=seed) / K**0.5, blocksize)
    constants = (None, *double_quant.quantize_absmax(absmax)) if double else (absmax, None, None, None)
    return Weight(packed, *constants, blocksize, N, K)


def check_rows(dtype, N, K, gap, blocksize):
    """The same values as for a contiguous tensor, and what lies between the rows is not written."""
    weight = quantized(N, K, blocksize=blocksize, double=blocksize != 128)
    rows = torch.full((N, K + gap), torch.nan, dtype=dtype)
    dequantize_nf4(weight, out=rows[:, :K])
    contiguous = torch.empty(N, K, dtype=dtype)
    dequantize_nf4(weight, out=contiguous)
    assert torch.equal(rows[:, :K], contiguous)
    assert rows[:, K:].isnan().all()


def check_group(dtype, p, K, widths, ranks, used=None):
    """Forward and backward of a group by the decode plan, within the bounds of the other plans."""
    M, biases = 37, [gaussian(widths[0], seed=3), None][: len(widths)]
    weights = [quantized(N, K, seed=i) for i, N in enumerate(widths)]
    x, seed = gaussian(M, K, dtype=dtype, seed=2), torch.tensor([9])
    dropout = Dropout(dropout_keep(seed, M, K, p), keep_scale(p)) if p else None
    B = [(gaussian(N, r, seed=5) * 0.1).to(dtype).float() for N, r in zip(widths, ranks, strict=True)]
    lora = GroupLoRA((gaussian(sum(ranks), K, seed=4) * 0.1).to(dtype).float(), B, seed, [0.7, 2.0][: len(B)], p)
    grad_ys = [gaussian(M, N, dtype=dtype, seed=6 + N) for N in widths]
    with use_plan("linear_nf4", Plan("decode")), use_plan("linear_nf4_grad_x", Plan("decode")):
        ys, s = linear_nf4_lora_group(x, weights, biases, lora)
        grad_x, grad_A, grads_B = linear_nf4_lora_group_backward(grad_ys, x, s, weights, lora, Needs())

    parts, grads_A, total = s.split(list(ranks), dim=1), grad_A.split(list(ranks)), None
    arithmetic = arithmetic_of("triton", dtype)
    for i, member in enumerate(lora.split_per_linear()):
        with qk.use_backend("reference"):
            w = torch.ops.qlora_kernels.dequantize_nf4(*weights[i], dtype=dtype).view(widths[i], K)
        factors = (member.B, member.scaling)
        assert_within(parts[i], lora_down(x, member.A, dropout, arithmetic), f"s_{i}")
        assert_within(ys[i], lora_forward(x, w, biases[i], parts[i], *factors, arithmetic), f"y_{i}")
        expected = lora_backward(grad_ys[i], x, parts[i], w, member.A, *factors, dropout, arithmetic)
        assert_within(grads_A[i], expected.lora_A, f"grad of A_{i}")
        assert_within(grads_B[i], expected.lora_B, f"grad of B_{i}")
        total = expected.x if total is None else total + expected.x
    assert_within(grad_x, total.to(dtype), "grad_x")


def operands(N, K, r, dtype, blocksize=64, double=True):
    with qk.use_backend("reference"):
        packed, state = qk.quantize_nf4(gaussian(N, K) / K**0.5, blocksize, double)
        w = qk.dequantize_nf4(packed, state, torch.float32)
    A, B = ((gaussian(*size, seed=4) * 0.2).to(dtype).float() for size in ((r, K), (N, r)))
    return weight_of("test", packed, state), w, LoRA(A, B, None, 1.7, 0.0)


def check_merged_weight(dtype, N, K, r, blocksize=64, double=True):
    weight, w, lora = operands(N, K, r, dtype, blocksize, double)
    out = torch.full((N, K), torch.nan, dtype=dtype)
    merge_lora(weight, lora, out)
    assert_within(out, merged_weight(w, lora.A, lora.B, lora.scaling, Arithmetic(dtype, composed=False)), "W'")
    if dtype != torch.float32:
        once = (w + lora.scaling * (lora.B @ lora.A)).to(dtype)
        assert (out != once).float().mean() < 0.01, "one rounding; sums of another order may cross a boundary"


TWO_PASSES = (16, 400, 64)
"""(M, N, r), for which `small_gpu` takes two passes over grad_y in bf16."""


@contextmanager
def small_gpu():
    """Plan for a GPU of one slow multiprocessor, where launches cost nothing beside bytes."""
    with mock.patch.dict(ARCHS, {80: replace(ARCHS[80], sm_count=1, bytes_per_s=1.0)}):
        planner.arch_for.cache_clear()
        lora_grads._ds_grad_B_sequence.cache_clear()
        yield
    planner.arch_for.cache_clear()
    lora_grads._ds_grad_B_sequence.cache_clear()


def check_ds_and_grad_B(M, N, r, dtype, copies):
    grad_y, s, B = gaussian(M, N, dtype=dtype), gaussian(M, r, dtype=dtype, seed=1), gaussian(N, r, seed=2)
    rows = torch.full((M, N + 16), torch.nan, dtype=dtype)
    ds, grad_B = lora_ds_grad_B(grad_y, s, B, 0.7, Needs(), rows[:, :N] if copies else None)
    a = arithmetic_of("triton", dtype)
    g = a.input(grad_y)
    assert_within(ds, a.product(g, a.input(B)).scaled(0.7).to(dtype), "ds")
    assert_within(grad_B, a.partial(a.product(g.T, a.input(s)).scaled(0.7)).to(torch.float32), "grad_B")
    if copies:
        assert torch.equal(rows[:, :N], grad_y)
        assert rows[:, N:].isnan().all()


def check_two_passes(dtype=torch.bfloat16, copies=False):
    with small_gpu():
        assert passes_over_grad_y(*TWO_PASSES, dtype, 80) == 2
        check_ds_and_grad_B(*TWO_PASSES, dtype, copies)
