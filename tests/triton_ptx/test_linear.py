"""The linears' sm_80 PTX, forward and backward, executed on the host against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlora_kernels.backends.triton.linear_nf4_lora import linear_nf4_lora, linear_nf4_lora_backward
from qlora_kernels.backends.triton.linear_nf4_multi_lora import linear_nf4_multi_lora, linear_nf4_multi_lora_backward
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops._config import Plan, use_plan
from qlora_kernels.ops._operands import LoRA, MultiLoRA, Weight
from qlora_kernels.ops._philox import dropout_keep, keep_scale
from tests.support.problems import gaussian
from tests.support.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_baseline
from tests.support.triton_on_host import executing_ptx

M, N, K, R = 19, 72, 192, 8
SCALING, DROPOUT = 1.5, 0.25


def quantized(N, K, dtype):
    """(the weight, with double quantization; the same dequantized to `dtype`)."""
    packed, absmax = reference.quantize_nf4(gaussian(N, K) / K**0.5, 64)
    constants = double_quant.quantize_absmax(absmax)
    w = reference.dequantize_nf4(packed, double_quant.dequantize_absmax(*constants), 64, torch.Size((N, K)), dtype)
    return Weight(packed, None, *constants, 64, N, K), w


def assert_gradients(actual, composed, exact):
    for name, grad, base, true in zip(("grad_x", "grad_A", "grad_B"), actual, composed, exact, strict=True):
        assert_within_baseline(grad, base.to(grad.dtype), true, factor=GRADIENT_FACTOR, name=name)


def test_lora_linear():
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
    assert_gradients(grads, composed_grads, exact_grads)


SMALL_M = [(1, torch.float16, 1), (2, torch.bfloat16, 1), (3, torch.float32, 2)]


@pytest.mark.parametrize(("M", "dtype", "split"), SMALL_M, ids=str)
def test_small_m(M, dtype, split):
    """Two steps along K, the second of 64; a last row of w alone in its tile. Split: one step in each part."""
    N, K = 21, 576
    weight, w = quantized(N, K, dtype)
    x, bias = gaussian(M, K, seed=1, dtype=dtype), gaussian(N, seed=3)
    lora_A, lora_B = (gaussian(R, K, seed=4) / K**0.5).to(dtype).float(), gaussian(N, R, seed=5).to(dtype).float()
    plan = Plan("small_m", block_n=4 if M < 3 else 2, block_k=512, split_k=split, num_warps=1)
    with use_plan("linear_nf4", plan), executing_ptx() as launches:
        y, _ = linear_nf4_lora(x, weight, bias, LoRA(lora_A, lora_B, None, SCALING, 0.0))
    assert "linear_nf4_small_m_kernel" in {run.name for run in launches}

    def composition(kind):
        s = x.to(kind) @ lora_A.to(kind).T
        return torch.nn.functional.linear(x.to(kind), w.to(kind), bias.to(kind)) + SCALING * (s @ lora_B.to(kind).T)

    assert_within_baseline(y, composition(dtype), composition(torch.float64), factor=FORWARD_FACTOR, name="y")


def test_multi_lora():
    """A tile of rows under three adapters and none, one of them absent from the batch; dropout in both passes."""
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
        grads = linear_nf4_multi_lora_backward(grad_y, x, s, weight, lora, need_grad_x=True)
    kernels = {f"multi_lora_{part}_kernel" for part in ("down", "up", "ds_grad_B", "grad_A")}
    assert kernels <= {run.name for run in launches}

    keep = dropout_keep(seed, M, K, DROPOUT) * keep_scale(DROPOUT)
    chosen = adapter.clamp(min=0)
    scale = (scalings[chosen] * (adapter >= 0)).unsqueeze(1)

    def composition(kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, lora_A, lora_B)]
        s = torch.einsum("mk,mrk->mr", leaves[0] * keep.to(kind), leaves[1][chosen])
        y = torch.nn.functional.linear(leaves[0], w.to(kind), bias.to(kind))
        y = y + scale.to(kind) * torch.einsum("mr,mnr->mn", s, leaves[2][chosen])
        return y.detach(), torch.autograd.grad(y, leaves, grad_y.to(kind))

    (composed, composed_grads), (exact, exact_grads) = composition(dtype), composition(torch.float64)
    assert_within_baseline(y, composed, exact, factor=FORWARD_FACTOR, name="y")
    assert_gradients(grads, composed_grads, exact_grads)
    assert not grads[1][2].any(), "an adapter that no row names has no gradient"
    assert not grads[2][2].any()
