"""The fused LoRA linear's sm_80 PTX, forward and backward, executed on the host against float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from qlora_kernels.backends.triton.linear_nf4_lora import linear_nf4_lora, linear_nf4_lora_backward
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops._config import Plan, use_plan
from qlora_kernels.ops._operands import LoRA, Weight
from qlora_kernels.ops._philox import dropout_keep, keep_scale
from tests.support.problems import gaussian
from tests.support.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_baseline
from tests.support.triton_on_host import executing_ptx

M, N, K, R = 19, 72, 192, 8
SCALING, DROPOUT = 1.5, 0.25


def test_lora_linear():
    """Partial tiles of M and N, three steps along K, dropout in both passes; the backward in two unequal splits."""
    dtype = torch.bfloat16
    packed, absmax = reference.quantize_nf4(gaussian(N, K) / K**0.5, 64)
    constants = (None, *double_quant.quantize_absmax(absmax))
    w = reference.dequantize_nf4(packed, double_quant.dequantize_absmax(*constants[1:]), 64, torch.Size((N, K)), dtype)
    x, grad_y = gaussian(M, K, seed=1, dtype=dtype), gaussian(M, N, seed=2, dtype=dtype)
    bias = gaussian(N, seed=3)
    lora_A, lora_B = (gaussian(R, K, seed=4) / K**0.5).to(dtype).float(), gaussian(N, R, seed=5).to(dtype).float()
    seed = torch.tensor([987654321987654321])
    weight, lora = Weight(packed, *constants, 64, N, K), LoRA(lora_A, lora_B, seed, SCALING, DROPOUT)
    plan = Plan("fused", block_m=16, block_n=64, block_k=64)
    split = replace(plan, split_k=2)
    with use_plan("linear_nf4", plan), use_plan("linear_nf4_grad_x", split), executing_ptx() as launches:
        y, s = linear_nf4_lora(x, weight, bias, lora)
        grads = linear_nf4_lora_backward(grad_y, x, s, weight, lora, need_grad_x=True)
    assert {"linear_nf4_kernel", "linear_nf4_grad_x_kernel", "lora_ds_grad_B_kernel"} <= {run.name for run in launches}

    keep = dropout_keep(seed, M, K, DROPOUT) * keep_scale(DROPOUT)

    def composition(kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, lora_A, lora_B)]
        s = (leaves[0] * keep.to(kind)) @ leaves[1].T
        y = torch.nn.functional.linear(leaves[0], w.to(kind), bias.to(kind)) + SCALING * (s @ leaves[2].T)
        return y.detach(), s.detach(), torch.autograd.grad(y, leaves, grad_y.to(kind))

    (composed, composed_s, composed_grads), (exact, exact_s, exact_grads) = (
        composition(dtype),
        composition(torch.float64),
    )
    assert_within_baseline(y, composed, exact, factor=FORWARD_FACTOR, name="y")
    assert_within_baseline(s, composed_s, exact_s, factor=FORWARD_FACTOR, name="s")
    for name, grad, base, true in zip(("grad_x", "grad_A", "grad_B"), grads, composed_grads, exact_grads, strict=True):
        assert_within_baseline(grad, base.to(grad.dtype), true, factor=GRADIENT_FACTOR, name=name)
