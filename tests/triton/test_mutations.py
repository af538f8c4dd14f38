"""The checks detect faults: a mutation of one word in a kernel's source makes the comparison of its result fail."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends.triton.planner import Plan, use_plan
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops.operands import LoRA, MultiLoRA, weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import Arithmetic, Dropout, assert_lora, assert_multi_lora
from tests.support.planted_fault import mutation_tests
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within, exactly, total

from .checks import check_group, check_merged_weight, check_rows, check_two_passes

FUSED = Plan("fused", block_m=16, block_n=64, block_k=64)
SPLIT = Plan("fused", block_m=16, block_n=64, block_k=64, split_k=2)
DECODE = Plan("decode")
SMALL_M = Plan("small_m", block_n=2, block_k=512, num_warps=1)


def codec():
    w = gaussian(20000)
    packed, absmax = reference.quantize_nf4(w, 64)
    assert torch.equal(torch.ops.qlora_kernels.quantize_nf4(w, blocksize=64)[0], packed)
    q, scale, offset = torch.ops.qlora_kernels.quantize_absmax(absmax)
    for actual, expected in zip((q, scale), double_quant.quantize_absmax(absmax, offset), strict=False):
        assert torch.equal(actual, expected)
    _, state = qk.quantize_nf4(w)
    assert torch.equal(
        qk.dequantize_nf4(packed, state), reference.dequantize_nf4(packed, state.absmax, 64, w.shape, w.dtype)
    )


def lora(plan, M=5, N=40, K=192):
    """Forward and gradients in fp32, within the bounds of python/numerics/tolerances.py."""
    r, scaling, p = 4, 1.7, 0.3
    with qk.use_backend("reference"):
        packed, state = qk.quantize_nf4(gaussian(N, K))
        w = qk.dequantize_nf4(packed, state)
    x, bias, A, B = leaves = [
        gaussian(M, K, seed=1),
        gaussian(N, seed=2),
        gaussian(r, K, seed=3),
        gaussian(N, r, seed=4),
    ]
    grad_y, seed = gaussian(M, N, seed=5), torch.tensor([2**40 + 3])
    for leaf in leaves:
        leaf.requires_grad_()
    with use_plan("linear_nf4", plan), use_plan("linear_nf4_grad_x", FUSED if plan is SMALL_M else plan):
        weight = weight_of("test", packed, state)
        y, s = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight, bias, *LoRA(A, B, seed, scaling, p))
        grad_x, grad_bias, grad_A, grad_B = torch.autograd.grad(y, leaves, grad_y)
    dropout = Dropout(dropout_keep(seed, M, K, p), keep_scale(p))
    inputs = (x, w, bias, A, B, grad_y)
    assert_lora((y, s, grad_x, grad_A, grad_B), inputs, scaling, dropout, Arithmetic(torch.float32))
    assert_within(grad_bias, total(exactly(grad_y)).to(torch.float32), "grad_bias")


def multi():
    M, N, K, r, p = 37, 40, 72, 4, 0.3
    with qk.use_backend("reference"):
        packed, state = qk.quantize_nf4(gaussian(N, K))
        w = qk.dequantize_nf4(packed, state)
    x, A, B = leaves = [gaussian(M, K, seed=1), gaussian(2, r, K, seed=3), gaussian(2, N, r, seed=4)]
    adapter, seed, scalings = torch.arange(M) % 3 - 1, torch.tensor([11]), torch.tensor([2.0, 0.5])
    grad_y = gaussian(M, N, seed=5)
    for leaf in leaves:
        leaf.requires_grad_()
    lora = MultiLoRA(A, B, scalings, adapter, seed, p)
    y, s = torch.ops.qlora_kernels.linear_nf4_multi_lora(x, *weight_of("test", packed, state), None, *lora)
    results = (y, s, *torch.autograd.grad(y, leaves, grad_y))
    dropout = Dropout(dropout_keep(seed, M, K, p), keep_scale(p))
    assert_multi_lora(results, (x, w, None, A, B, grad_y), scalings, adapter, dropout, Arithmetic(torch.float32))


CHECKS = {
    "codec": codec,
    "fused": lambda: lora(FUSED),
    "split": lambda: lora(SPLIT),
    "decode": lambda: lora(DECODE),
    "parts": lambda: lora(DECODE, M=37, N=72),
    "one split": lambda: lora(DECODE, K=32),
    "small_m": lambda: lora(SMALL_M, M=2, N=7, K=576),
    "multi": multi,
    "extended": lambda: check_group(torch.bfloat16, 0.0, 64, (57,), (5,)),
    "two passes": check_two_passes,
    "merged": lambda: check_merged_weight(torch.bfloat16, 130, 128, 70),
    "rows of 448": lambda: check_rows(torch.bfloat16, 40, 448, 32, 128),
    "rows of 1088": lambda: check_rows(torch.bfloat16, 5, 1088, 16, 64),
}

MUTATIONS = [
    ("decode", "return high, low", "return low, high", "codec"),
    ("decode", " * scale + tl.load(p_absmax_offset)", " * scale", "fused"),
    ("decode", "o_block // 256", "o_block // 64", "fused"),
    ("decode", "4 * (1 - i % 2)", "4 * (i % 2)", "small_m"),
    ("linear_nf4_small_m", "tl.fma(runs, b_absmax, sums[m])", "tl.fma(runs, b_absmax, 0.0)", "small_m"),
    ("linear_nf4_small_m", "b_absmax = next_words, next_absmax", "b_absmax = next_words, next_absmax * 2", "small_m"),
    ("linear_nf4_small_m", "* RUN // BLOCKSIZE", "* RUN // BLOCKSIZE * 0", "small_m"),
    ("linear_nf4_small_m", "p_x + m * K", "p_x", "small_m"),
    ("linear_nf4_small_m", "low_rank * scaling", "low_rank", "small_m"),
    ("linear_nf4_small_m", "if HAS_BIAS:", "if False:", "small_m"),
    ("linear_nf4_small_m", "o_k // BLOCKSIZE < blocks", "o_k // BLOCKSIZE < blocks + 1", "small_m"),
    ("dequantize_nf4", "* scale + offset", "* scale", "codec"),
    ("dequantize_nf4", "ROW_VALUES) // BLOCKSIZE", "ROW_VALUES + 64) // BLOCKSIZE", "codec"),
    ("quantize_nf4", "high * 16 + low", "low * 16 + high", "codec"),
    ("quantize_nf4", "x > BOUNDARIES[7]", "x > BOUNDARIES[8]", "codec"),
    ("quantize_absmax", "other=0.0) - offset", "other=0.0)", "codec"),
    ("quantize_absmax", "half = 128 >> step", "half = 64 >> step", "codec"),
    ("linear_nf4_gemm", "acc *= scaling", "acc *= 1.0", "fused"),
    ("linear_nf4_gemm", "b_absmax = next_absmax", "b_absmax = b_absmax", "fused"),
    ("linear_nf4_gemm", "if HAS_BIAS:", "if False:", "fused"),
    ("linear_nf4_gemm", "acc * keep_scale, 0.0", "acc, 0.0", "fused"),
    ("linear_nf4_gemm", "tl.trans(keep), acc", "tl.trans(keep) | True, acc", "fused"),
    ("linear_nf4_gemm", "first = i_split * steps", "first = 0", "split"),
    ("lora_down", "tl.where(keep, b_x, 0.0)", "b_x", "decode"),
    ("lora_down", "tl.store(p_tile, b_x,", "tl.store(p_tile, b_x * 2,", "extended"),
    ("lora_down", "row_m[:, None] * stride_copy", "row_m[:, None] * K", "extended"),
    ("lora_grads", "tl.store(p_tile, b_grad,", "tl.store(p_tile, b_grad * 2,", "extended"),
    ("lora_grads", "row_m[:, None] * stride_copy", "row_m[:, None] * N", "extended"),
    ("dequantize_nf4", "((o_column // K).to(tl.int64) * gap)", "(o_column * 0)", "rows of 448"),
    ("dequantize_nf4", "column %= K", "column %= gap", "rows of 448"),
    ("dequantize_nf4", "(o_column >= K)[:, None]", "(o_column > K)[:, None]", "rows of 1088"),
    ("dequantize_nf4", "column -= tl.where(column >= K, K, 0)", "column -= 0", "rows of 1088"),
    ("lora_down", ".to(tl.int64) * stride_A_k", ".to(tl.int64) * 1", "two passes"),
    ("lora_grads", "DropoutRate(0, scaling)", "DropoutRate(0, 1.0)", "two passes"),
    ("lora_grads", "transposed=True", "transposed=False", "two passes"),
    ("lora_up", "acc *= scaling", "acc *= 1.0", "decode"),
    ("lora_up", "acc += base", "acc += 0.0", "decode"),
    ("lora_up", "range(parts)", "range(1)", "split"),
    ("lora_up", "tl.where(keep, acc, 0.0)", "acc", "decode"),
    ("lora_down", "rate.scale if splits == 1 else 1.0", "1.0", "one split"),
    ("lora_grads", "ds, tiles_n, (M, r), scaling", "ds, tiles_n, (M, r), 1.0", "parts"),
    ("lora_grads", "(N, r),\n        scaling,", "(N, r),\n        1.0,", "parts"),
    ("lora_grads", "(r, K), rate.scale", "(r, K), 1.0", "parts"),
    ("lora_grads", "scaling if tiles_n == 1 else 1.0", "1.0", "decode"),
    ("lora_grads", "scaling if chunks == 1 else 1.0", "1.0", "decode"),
    ("lora_grads", ", rate.scale if chunks == 1 else 1.0", ", 1.0", "decode"),
    ("lora_grads", "tl.where(keep, b_x, 0.0)", "b_x", "decode"),
    ("partials", "total * scale", "total", "decode"),
    ("dropout", "words & 0xFFFF, words >> 16", "words >> 16, words & 0xFFFF", "decode"),
    ("linear_nf4_lora_merged", "update * scaling", "update", "merged"),
    ("linear_nf4_lora_merged", "(b_w + update", "(b_w.to(p_w.dtype.element_ty) + update", "merged"),
    ("linear_nf4_lora_merged", "range(0, R, BLOCK_R)", "range(0, BLOCK_R, BLOCK_R)", "merged"),
    ("linear_nf4_lora_merged", "i_k * BLOCK_K // BLOCKSIZE", "i_k * 0", "merged"),
    ("linear_nf4_multi_lora", "factor * tl.load(p_scalings + e)", "factor", "multi"),
    ("multi_lora_grads", 'input_precision="ieee") * scale', 'input_precision="ieee")', "multi"),
    ("multi_lora_grads", "(acc * keep_scale)", "(acc)", "multi"),
    (
        "linear_nf4_multi_lora",
        "tl.where(b_adapter > e, b_adapter, e_last + 1)",
        "(b_adapter * 0 + e_last + 1)",
        "multi",
    ),
]


@pytest.fixture(autouse=True)
def triton_backend():
    with qk.use_backend("triton"):
        yield


test_checks_pass_unmutated, test_mutation_is_detected = mutation_tests(CHECKS, MUTATIONS)
