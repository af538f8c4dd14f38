"""The low-rank term inside the base product (ops/extended_k.py), interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.triton import planner
from qlora_kernels.ops import extended_k
from qlora_kernels.ops.registry import Problem
from tests.support.problems import DTYPES, dtype_name

from .checks import check_group, check_rows


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
