"""The group's launches as sm_80 PTX, executed on the host: each linear equals itself alone, grad_x their sum."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.triton.linear_nf4_lora import linear_nf4_lora, linear_nf4_lora_backward
from qlora_kernels.backends.triton.linear_nf4_lora_group import linear_nf4_lora_group, linear_nf4_lora_group_backward
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops._config import Plan, use_plan
from qlora_kernels.ops._operands import GroupLoRA, Weight
from tests.support.problems import gaussian
from tests.support.triton_on_host import executing_ptx

M, K, WIDTHS, RANKS = 19, 128, (72, 24), (8, 4)


def quantized(N, seed):
    packed, absmax = reference.quantize_nf4(gaussian(N, K, seed=seed) / K**0.5, 64)
    return Weight(packed, None, *double_quant.quantize_absmax(absmax), 64, N, K)


@pytest.mark.parametrize(
    "plan", [Plan("decode"), Plan("fused", block_m=16, block_n=64, block_k=64)], ids=["decode", "fused"]
)
def test_group_equals_its_linears(plan):
    dtype = torch.float16
    weights = [quantized(N, i) for i, N in enumerate(WIDTHS)]
    x, biases = gaussian(M, K, seed=4, dtype=dtype), [gaussian(WIDTHS[0], seed=5), None]
    B = [gaussian(N, r, seed=6) for N, r in zip(WIDTHS, RANKS, strict=True)]
    lora = GroupLoRA(gaussian(sum(RANKS), K, seed=7) / K**0.5, B, torch.tensor([123456789]), [1.5, 0.5], 0.25)
    grad_ys = [gaussian(M, N, seed=8, dtype=dtype) for N in WIDTHS]
    with use_plan("linear_nf4", plan), use_plan("linear_nf4_grad_x", plan), executing_ptx() as launches:
        ys, s = linear_nf4_lora_group(x, weights, biases, lora)
        grad_x, grad_A, grads_B = linear_nf4_lora_group_backward(grad_ys, x, s, weights, lora, need_grad_x=True)
        names = [run.name for run in launches]
        alone = [linear_nf4_lora(x, *each) for each in zip(weights, biases, lora.each(), strict=True)]
        arguments = zip(grad_ys, (part for _, part in alone), weights, lora.each(), strict=True)
        gradients = [linear_nf4_lora_backward(g, x, *rest, need_grad_x=True) for g, *rest in arguments]
    assert names.count("lora_down_kernel") == names.count("lora_grad_A_kernel") == 1
    # Another split of the ranks into tiles may add in another order: an ulp of fp16 at the size of the values.
    close = {"rtol": 2e-3, "atol": 2e-3}
    parts, grads_A = torch.split(s, RANKS, dim=1), torch.split(grad_A, RANKS)
    for i, ((y, part), (_, of_A, of_B)) in enumerate(zip(alone, gradients, strict=True)):
        for actual, expected in ((ys[i], y), (parts[i], part), (grads_A[i], of_A), (grads_B[i], of_B)):
            torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(grad_x.float(), sum(of_x.float() for of_x, _, _ in gradients), rtol=2e-3, atol=1e-2)
