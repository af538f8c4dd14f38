"""Class 2 (matmul and gradients): the linear kernels against float64, interpreted.

Every path runs on every dtype. The plan is forced, so that small shapes include split sums and partial tiles.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_kernels as qk
from qlora_kernels.backends.triton.linear_nf4 import linear_nf4, whole_words
from qlora_kernels.backends.triton.planner import Plan, use_plan
from qlora_kernels.ops.operands import LoRA, weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import (
    Arithmetic,
    Dropout,
    linear,
    linear_grad_x,
    lora_backward,
    lora_down,
    lora_forward,
)
from tests.support.problems import DTYPES, Shape, dtype_name, gaussian
from tests.support.tolerances import assert_within, exactly, total

FUSED = Plan("fused", block_m=16, block_n=64, block_k=64)
PLANS = {
    "decode": Plan("decode"),
    "fused": FUSED,
    "wide": Plan("fused", block_m=64, block_n=128, block_k=64),
    "split": Plan("fused", block_m=16, block_n=64, block_k=64, split_k=2),
    "small_m": Plan("small_m", block_n=4, block_k=512, num_warps=1),
    "small_m split": Plan("small_m", block_n=2, block_k=512, split_k=2, num_warps=1),
}
ALIGNED = Shape(19, 83, 320, r=8)
"""Partial tiles of M and N; five steps along K, so that two splits are unequal."""
FEW_ROWS = Shape(3, 21, 1088, r=8)
"""The same for small_m: three steps along K, the last of 64; of two splits one has a single step."""

CASES = [
    *((ALIGNED, plan, dtype, True) for plan in ("decode", "fused", "wide", "split") for dtype in DTYPES),
    *((FEW_ROWS, plan, dtype, True) for plan in ("small_m", "small_m split") for dtype in DTYPES),
    (FEW_ROWS, "small_m", torch.bfloat16, False),
    (Shape(1, 64, 64, r=1), "small_m split", torch.bfloat16, False),  # an empty part
    (Shape(1, 37, 96, r=64, blocksize=32), "small_m", torch.float32, True),
    (Shape(2, 5, 4096, r=1, blocksize=4096), "small_m split", torch.float16, True),  # blocks longer than a step
    (Shape(4, 6, 576, r=256), "small_m", torch.bfloat16, True),
    (ALIGNED, "fused", torch.bfloat16, False),
    (ALIGNED, "split", torch.float16, False),
    (Shape(1, 64, 64, r=1), "split", torch.bfloat16, True),  # fewer steps than splits: an empty part
    (Shape(5, 40, 256, r=64, blocksize=128), "fused", torch.bfloat16, True),
    (Shape(5, 70, 512, r=256, blocksize=256), "fused", torch.bfloat16, True),
    (Shape(65, 130, 128, r=16), "wide", torch.bfloat16, True),
    (Shape(7, 33, 96, r=4), "decode", torch.bfloat16, True),  # blocks straddle rows
    (Shape(5, 17, 31, r=1, blocksize=32), "decode", torch.float32, True),  # an odd number of weights
    (Shape(66, 130, 257, r=5, blocksize=128), "decode", torch.float16, False),
]


def case_id(value):
    return dtype_name(value) if isinstance(value, torch.dtype) else None if isinstance(value, str) else str(value)


cases = pytest.mark.parametrize(("shape", "plan", "dtype", "double_quant"), CASES, ids=case_id)


class Problem:
    """Operands of one case in `dtype`; adapters are fp32 masters with values that dtype represents."""

    def __init__(self, shape, dtype, double_quant):
        with qk.use_backend("reference"):
            packed, state = qk.quantize_nf4(gaussian(shape.N, shape.K) / shape.K**0.5, shape.blocksize, double_quant)
            self.w = qk.dequantize_nf4(packed, state, dtype)
            self.fp32_w = qk.dequantize_nf4(packed, state)
        self.packed, self.state = packed, state
        self.x = gaussian(shape.M, shape.K, seed=1, dtype=dtype)
        self.grad_y = gaussian(shape.M, shape.N, seed=2, dtype=dtype)
        self.bias = gaussian(shape.N, seed=3, dtype=dtype)
        self.lora_A = (gaussian(shape.r, shape.K, seed=4) / shape.K**0.5).to(dtype).float()
        self.lora_B = gaussian(shape.N, shape.r, seed=5).to(dtype).float()

    def weight(self, plan):
        """Return W as the forward multiplies by it: small_m does not round code * absmax to x's dtype."""
        return self.fp32_w if PLANS[plan].path == "small_m" else self.w

    def forced(self, plan, blocksize):
        stack = ExitStack()
        stack.enter_context(qk.use_backend("triton"))
        chosen = grad_x = PLANS[plan]
        if plan != "decode":
            grad_x = FUSED if chosen.path == "small_m" else chosen
            grad_x = replace(grad_x, block_k=min(grad_x.block_k, blocksize))
        stack.enter_context(use_plan("linear_nf4", chosen if chosen.path == "small_m" else grad_x))
        stack.enter_context(use_plan("linear_nf4_grad_x", grad_x))
        return stack


def arithmetic_of(plan, dtype):
    """Return the arithmetic of y and grad_x.

    On the decode path torch multiplies, and lora_up adds to its rounded result; the other kernels round once.
    """
    return Arithmetic(dtype, composed=plan == "decode")


@cases
def test_linear(shape, plan, dtype, double_quant):
    problem = Problem(shape, dtype, double_quant)
    x = problem.x.requires_grad_()
    with problem.forced(plan, shape.blocksize):
        y = qk.linear_nf4(x, problem.packed, problem.state, problem.bias)
        (grad_x,) = torch.autograd.grad(y, x, problem.grad_y)
    arithmetic = arithmetic_of(plan, dtype)
    assert_within(y, linear(x, problem.weight(plan), problem.bias, arithmetic), "y")
    assert_within(grad_x, linear_grad_x(problem.grad_y, problem.w, arithmetic), "grad_x")


@cases
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
def test_linear_lora(shape, plan, dtype, double_quant, dropout_p):
    problem = Problem(shape, dtype, double_quant)
    seed = torch.tensor([0x1234_5678_9ABC_DEF1])
    scaling = 1.7
    x, bias, A, B = leaves = [t.requires_grad_() for t in (problem.x, problem.bias, problem.lora_A, problem.lora_B)]
    lora = LoRA(A, B, seed, scaling, dropout_p)
    with problem.forced(plan, shape.blocksize):
        weight = weight_of("test", problem.packed, problem.state)
        y, s = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight, bias, *lora)
        grad_x, grad_bias, grad_A, grad_B = torch.autograd.grad(y, leaves, problem.grad_y)

    dropout = Dropout(dropout_keep(seed, shape.M, shape.K, dropout_p), keep_scale(dropout_p)) if dropout_p else None
    arithmetic = arithmetic_of(plan, dtype)
    fused = Arithmetic(dtype, composed=False)  # the kernels of the factors, under every plan
    assert_within(s, lora_down(x, A, dropout, fused), "s")
    assert_within(y, lora_forward(x, problem.weight(plan), bias, s, B, scaling, arithmetic), "y")
    operands = (problem.grad_y, x, s, problem.w, A, B, scaling, dropout)
    assert_within(grad_x, lora_backward(*operands, arithmetic).x, "grad_x")
    assert_within(grad_A, lora_backward(*operands, fused).lora_A, "grad_A")
    assert_within(grad_B, lora_backward(*operands, fused).lora_B, "grad_B")
    assert_within(grad_bias, total(exactly(problem.grad_y)).to(dtype), "grad_bias")


@pytest.mark.parametrize("plan", PLANS)
def test_outputs_repeat_and_rows_are_independent(plan):
    """Two calls give the same bits, and rows do not affect each other."""
    problem = Problem(FEW_ROWS if plan.startswith("small_m") else ALIGNED, torch.bfloat16, True)
    with problem.forced(plan, 64):
        arguments = (problem.packed, problem.state, problem.lora_A, problem.lora_B)
        first = qk.linear_nf4_lora(problem.x, *arguments, scaling=2.0)
        assert torch.equal(first, qk.linear_nf4_lora(problem.x, *arguments, scaling=2.0))
        problem.x[-1] = torch.nan
        other = qk.linear_nf4_lora(problem.x, *arguments, scaling=2.0)
    assert torch.equal(first[:-1], other[:-1])
    assert other[-1].isnan().all()


def test_weight_not_aligned_to_words():
    """small_m reads words: a view that starts inside a word is copied, and any other weight is used in place."""
    problem = Problem(FEW_ROWS, torch.bfloat16, True)
    cut = torch.zeros(problem.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(problem.packed.flatten())
    assert whole_words(cut).data_ptr() % 4 == 0
    assert whole_words(problem.packed) is problem.packed
    with problem.forced("small_m", 64):
        expected, actual = (qk.linear_nf4(problem.x, packed, problem.state) for packed in (problem.packed, cut))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("plan", ["decode", "fused", "small_m"])
def test_compiled_in_one_graph(plan):
    """torch.compile has one op forward and one backward for every path."""
    problem = Problem(Shape(3, 21, 192, r=4), torch.float32, True)

    def run(x, A, B):
        return qk.linear_nf4_lora(x, problem.packed, problem.state, A, B, problem.bias, scaling=2.0)

    leaves = [t.requires_grad_() for t in (problem.x, problem.lora_A, problem.lora_B)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with problem.forced(plan, 64):
        expected, actual = run(*leaves), compiled(*leaves)
        assert torch.equal(actual, expected)
        for grads in zip(*(torch.autograd.grad(y, leaves, problem.grad_y) for y in (actual, expected)), strict=True):
            assert torch.equal(*grads)


class Allocations(TorchDispatchMode):
    """Records weak references to every tensor made inside the block."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made.append((tuple(result.shape), weakref.ref(result)))
        return result


def test_decoded_weight_is_freed_after_call():
    """Its memory is returned to torch's allocator, which handles streams and graph pools."""
    problem = Problem(ALIGNED, torch.bfloat16, True)
    weight = weight_of("linear_nf4", problem.packed, problem.state)
    with problem.forced("decode", 64), Allocations() as allocations:
        y = linear_nf4(problem.x, weight, problem.bias)
    decoded = [tensor for shape, tensor in allocations.made if shape == (ALIGNED.N, ALIGNED.K)]
    assert decoded
    assert all(tensor() is None for tensor in decoded)
    assert any(tensor() is y for _, tensor in allocations.made)
