"""The low-rank term inside the base product (ops/extended_k.py), interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends.triton import planner
from qlora_kernels.backends.triton.dequantize_nf4 import dequantize_nf4
from qlora_kernels.backends.triton.linear_nf4_lora_group import linear_nf4_lora_group, linear_nf4_lora_group_backward
from qlora_kernels.backends.triton.planner import Plan, use_plan
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops import extended_k
from qlora_kernels.ops.operands import GroupLoRA, Weight
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from qlora_kernels.ops.registry import Problem
from tests.support.linear_formulas import Dropout, arithmetic_of, lora_backward, lora_down, lora_forward
from tests.support.problems import DTYPES, dtype_name, gaussian
from tests.support.tolerances import assert_within


def quantized(N, K, seed=0, blocksize=64, double=True):
    packed, absmax = reference.quantize_nf4(gaussian(N, K, seed=seed) / K**0.5, blocksize)
    constants = (None, *double_quant.quantize_absmax(absmax)) if double else (absmax, None, None, None)
    return Weight(packed, *constants, blocksize, N, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("N", "K", "gap", "blocksize"),
    [
        (5, 4096, 16, 64),
        (17, 1024, 16, 64),  # a tile is one row
        (40, 448, 32, 128),  # a tile holds several rows; the last program is partial
        (5, 1088, 16, 64),  # rows end inside a tile
        (3, 5056, 7, 4096),  # blocks straddle rows
        (9, 96, 16, 32),
    ],
)
def test_rows_with_a_stride(dtype, N, K, gap, blocksize):
    check_rows(dtype, N, K, gap, blocksize)


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
        grad_x, grad_A, grads_B = linear_nf4_lora_group_backward(grad_ys, x, s, weights, lora, need_grad_x=True)

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


@pytest.mark.parametrize(
    ("dtype", "p", "K", "widths", "ranks"),
    [
        (torch.bfloat16, 0.0, 64, (57,), (5,)),
        (torch.float16, 0.3, 64, (57,), (16,)),
        (torch.bfloat16, 0.3, 128, (72, 40), (8, 16)),
        (torch.float16, 0.0, 64, (48, 40), (70, 3)),
    ],
)
def test_group(dtype, p, K, widths, ranks, monkeypatch):
    used = []
    for name in ("forward", "backward"):
        real = getattr(extended_k, name)
        monkeypatch.setattr(extended_k, name, lambda *a, _name=name, _real=real: (used.append(_name), _real(*a))[1])
    check_group(dtype, p, K, widths, ranks)
    assert used == (["forward"] if p and len(widths) == 1 else ["forward", "backward"])


def test_plan_says_where_the_low_rank_term_is_added():
    def plan(op, M=4096, N=4096, K=4096, dropout=False, dtype=torch.bfloat16):
        return str(planner.lora_plan(Problem(op, "cuda", dtype, M, N, K, 16, 64, True, dropout), 90))

    inside, added = extended_k.INSIDE, extended_k.ADDED
    assert inside in plan("linear_nf4_lora")
    assert inside in plan("linear_nf4_lora", dropout=True)
    assert inside in plan("linear_nf4_lora_backward")
    assert added in plan("linear_nf4_lora_backward", dropout=True)
    assert added in plan("linear_nf4_lora", K=14336)
    assert added in plan("linear_nf4_lora", dtype=torch.float32)
    assert added in plan("linear_nf4_lora", N=4128, K=4128), "rows that are not whole rows of the decoder's tile"
    few = plan("linear_nf4_lora", M=1)
    assert inside not in few
    assert added not in few
