"""The group's launches as sm_80 PTX, executed on the host: each linear equals the single op, grad_x is their sum."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.triton.linear_nf4_lora_group import linear_nf4_lora_group, linear_nf4_lora_group_backward
from qlora_kernels.backends.triton.planner import Plan, use_plan
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops.operands import GroupLoRA, Needs, Weight
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import Arithmetic, Dropout, lora_backward, lora_down, lora_forward
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within
from tests.support.triton_on_host import executing_ptx

M, K, WIDTHS, RANKS = 19, 128, (72, 24), (8, 4)


def quantized(N, seed):
    packed, absmax = reference.quantize_nf4(gaussian(N, K, seed=seed) / K**0.5, 64)
    return Weight(packed, None, *double_quant.quantize_absmax(absmax), 64, N, K)


@pytest.mark.parametrize(
    "plan", [Plan("decode"), Plan("fused", block_m=16, block_n=64, block_k=64)], ids=["decode", "fused"]
)
def test_group(plan):
    dtype = torch.float16
    weights = [quantized(N, i) for i, N in enumerate(WIDTHS)]
    x, biases = gaussian(M, K, seed=4, dtype=dtype), [gaussian(WIDTHS[0], seed=5), None]
    B = [gaussian(N, r, seed=6) for N, r in zip(WIDTHS, RANKS, strict=True)]
    lora = GroupLoRA(gaussian(sum(RANKS), K, seed=7) / K**0.5, B, torch.tensor([123456789]), [1.5, 0.5], 0.25)
    grad_ys = [gaussian(M, N, seed=8, dtype=dtype) for N in WIDTHS]
    with use_plan("linear_nf4", plan), use_plan("linear_nf4_grad_x", plan), executing_ptx() as launches:
        ys, s = linear_nf4_lora_group(x, weights, biases, lora)
        grad_x, grad_A, grads_B = linear_nf4_lora_group_backward(grad_ys, x, s, weights, lora, Needs())
        names = [run.name for run in launches]
    assert names.count("lora_down_kernel") == names.count("lora_grad_A_kernel") == 1

    arithmetic = Arithmetic(dtype, composed=True, factor_may_be_scaled=True)
    dropout = Dropout(dropout_keep(lora.seed, M, K, lora.dropout_p), keep_scale(lora.dropout_p))
    parts, grads_A, total = torch.split(s, RANKS, dim=1), torch.split(grad_A, RANKS), None
    for i, (weight, part, member) in enumerate(zip(weights, parts, lora.split_per_linear(), strict=True)):
        w = reference.dequantize_nf4(
            weight.packed, double_quant.dequantize_absmax(*weight.constants[1:]), 64, torch.Size((weight.N, K)), dtype
        )
        factors = (member.B, member.scaling)
        assert_within(part, lora_down(x, member.A, dropout, arithmetic), f"s_{i}")
        assert_within(ys[i], lora_forward(x, w, biases[i], part, *factors, arithmetic), f"y_{i}")
        expected = lora_backward(grad_ys[i], x, part, w, member.A, *factors, dropout, arithmetic)
        assert_within(grads_A[i], expected.lora_A, f"grad of A_{i}")
        assert_within(grads_B[i], expected.lora_B, f"grad of B_{i}")
        total = expected.x if total is None else (total + expected.x).to(dtype)
    assert_within(grad_x, total, "grad_x")
