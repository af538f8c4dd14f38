"""The decoder that adds a LoRA update (merge_lora_kernel), interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.triton.linear_nf4_lora_merged import (
    linear_nf4_lora_merged,
    linear_nf4_lora_merged_backward,
)
from qlora_kernels.backends.triton.planner import Plan, use_plan
from qlora_kernels.ops.operands import Needs
from tests.support.linear_formulas import arithmetic_of, assert_lora_merged
from tests.support.problems import DTYPES, dtype_name, gaussian

from .checks import check_merged_weight, operands


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("N", "K", "r", "blocksize", "double"),
    [(130, 128, 5, 64, True), (7, 96, 16, 32, False), (33, 512, 70, 256, True), (9, 96, 4, 64, True)],
)
def test_merged_weight(dtype, N, K, r, blocksize, double):
    """Partial tiles of N and r; the last case has blocks that straddle rows, which torch adds to."""
    check_merged_weight(dtype, N, K, r, blocksize, double)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_forward_and_gradients(dtype):
    M, N, K = 33, 72, 128
    weight, w, lora = operands(N, K, 8, dtype)
    x, bias, grad_y = gaussian(M, K, seed=1, dtype=dtype), gaussian(N, seed=2), gaussian(M, N, seed=3, dtype=dtype)
    with use_plan("linear_nf4", Plan("decode")), use_plan("linear_nf4_grad_x", Plan("decode")):
        y = linear_nf4_lora_merged(x, weight, bias, lora)
        gradients = linear_nf4_lora_merged_backward(grad_y, x, weight, lora, Needs())
    inputs = (x, w, bias, lora.A, lora.B, grad_y)
    assert_lora_merged((y, *gradients), inputs, lora.scaling, arithmetic_of("triton", dtype))
