"""The linears' PTX for sm_80 and, with wgmma, sm_90, forward and backward, executed on the host against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlora_kernels.backends.triton.linear_nf4_lora import linear_nf4_lora, linear_nf4_lora_backward
from qlora_kernels.backends.triton.linear_nf4_multi_lora import linear_nf4_multi_lora, linear_nf4_multi_lora_backward
from qlora_kernels.backends.triton.planner import Plan, use_plan
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops.operands import LoRA, MultiLoRA, Needs, Weight
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import Arithmetic, Dropout, assert_lora, assert_multi_lora, lora_down, lora_forward
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within
from tests.support.triton_on_host import CAPABILITIES, executing_ptx

M, N, K, R = 19, 72, 192, 8
SCALING, DROPOUT = 1.5, 0.25


def quantized(N, K, dtype):
    """Return (the weight, double-quantized; the same dequantized to `dtype`)."""
    packed, absmax = reference.quantize_nf4(gaussian(N, K) / K**0.5, 64)
    constants = double_quant.quantize_absmax(absmax)
    w = reference.dequantize_nf4(packed, double_quant.dequantize_absmax(*constants), 64, torch.Size((N, K)), dtype)
    return Weight(packed, None, *constants, 64, N, K), w


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_lora_linear(capability):
    """Partial tiles of M and N, three steps along K, dropout in both passes; the backward in two unequal splits."""
    dtype = torch.bfloat16
    weight, w = quantized(N, K, dtype)
    x, grad_y = gaussian(M, K, seed=1, dtype=dtype), gaussian(M, N, seed=2, dtype=dtype)
    bias = gaussian(N, seed=3)
    lora_A, lora_B = (gaussian(R, K, seed=4) / K**0.5).to(dtype).float(), gaussian(N, R, seed=5).to(dtype).float()
    seed = torch.tensor([987654321987654321])
    lora = LoRA(lora_A, lora_B, seed, SCALING, DROPOUT)
    plan = Plan("fused", block_m=16, block_n=64, block_k=64)
    split = replace(plan, split_k=2)
    with (
        use_plan("linear_nf4", plan),
        use_plan("linear_nf4_grad_x", split),
        executing_ptx(capability=capability) as launches,
    ):
        y, s = linear_nf4_lora(x, weight, bias, lora)
        grads = linear_nf4_lora_backward(grad_y, x, s, weight, lora, Needs())
    assert {"linear_nf4_kernel", "linear_nf4_grad_x_kernel", "lora_ds_grad_B_kernel"} <= {run.name for run in launches}
    products = {run.name: "wgmma.mma_async" in run.kernel.asm["ptx"] for run in launches}
    assert products["linear_nf4_kernel"] == products["linear_nf4_grad_x_kernel"] == (capability == 90)

    dropout = Dropout(dropout_keep(seed, M, K, DROPOUT), keep_scale(DROPOUT))
    inputs = (x, w, bias, lora_A, lora_B, grad_y)
    assert_lora((y, s, *grads), inputs, SCALING, dropout, Arithmetic(dtype, composed=False))


SMALL_M = [(1, torch.float16, 1), (2, torch.bfloat16, 1), (3, torch.float32, 2)]


@pytest.mark.parametrize(("M", "dtype", "split"), SMALL_M, ids=str)
def test_small_m(M, dtype, split):
    """Two steps along K, the second of 64; the last row of w is alone in its tile. Split: one step in each part."""
    N, K = 21, 576
    weight, w = quantized(N, K, torch.float32)  # the kernel does not round it to x's dtype
    x, bias = gaussian(M, K, seed=1, dtype=dtype), gaussian(N, seed=3)
    lora_A, lora_B = (gaussian(R, K, seed=4) / K**0.5).to(dtype).float(), gaussian(N, R, seed=5).to(dtype).float()
    plan = Plan("small_m", block_n=4 if M < 3 else 2, block_k=512, split_k=split, num_warps=1)
    with use_plan("linear_nf4", plan), executing_ptx() as launches:
        y, s = linear_nf4_lora(x, weight, bias, LoRA(lora_A, lora_B, None, SCALING, 0.0))
    assert "linear_nf4_small_m_kernel" in {run.name for run in launches}

    arithmetic = Arithmetic(dtype, composed=False)
    assert_within(s, lora_down(x, lora_A, None, arithmetic), "s")
    assert_within(y, lora_forward(x, w, bias, s, lora_B, SCALING, arithmetic), "y")


def test_multi_lora():
    """A tile has rows with three adapters and none, and one adapter is not used; dropout in both passes."""
    dtype, scalings = torch.bfloat16, torch.tensor([2.0, 0.5, 1.0, 3.0])
    weight, w = quantized(N, K, dtype)
    x, grad_y = gaussian(M, K, seed=1, dtype=dtype), gaussian(M, N, seed=2, dtype=dtype)
    lora_A = (gaussian(4, R, K, seed=4) / K**0.5).to(dtype).float()
    lora_B = gaussian(4, N, R, seed=5).to(dtype).float()
    adapter = torch.tensor([-1, 0, 3, 1] * 5)[:M]
    bias, seed = gaussian(N, seed=3), torch.tensor([123456789123456789])
    lora = MultiLoRA(lora_A, lora_B, scalings, adapter, seed, DROPOUT)
    plan = Plan("fused", block_m=16, block_n=64, block_k=64)
    with use_plan("linear_nf4", plan), use_plan("linear_nf4_grad_x", plan), executing_ptx() as launches:
        y, s = linear_nf4_multi_lora(x, weight, bias, lora)
        grads = linear_nf4_multi_lora_backward(grad_y, x, s, weight, lora, Needs())
    kernels = {f"multi_lora_{part}_kernel" for part in ("down", "up", "ds_grad_B", "grad_A")}
    assert kernels <= {run.name for run in launches}

    dropout = Dropout(dropout_keep(seed, M, K, DROPOUT), keep_scale(DROPOUT))
    inputs = (x, w, bias, lora_A, lora_B, grad_y)
    assert_multi_lora((y, s, *grads), inputs, scalings, adapter, dropout, Arithmetic(dtype))
    assert not grads[1][2].any(), "an adapter that no row names has no gradient"
    assert not grads[2][2].any()
