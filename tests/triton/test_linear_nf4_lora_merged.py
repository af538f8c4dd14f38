"""The decoder that adds a LoRA update (merge_lora_kernel), interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends.triton.linear_nf4_lora_merged import (
    linear_nf4_lora_merged,
    linear_nf4_lora_merged_backward,
    merge_lora,
)
from qlora_kernels.backends.triton.planner import Plan, use_plan
from qlora_kernels.ops.operands import LoRA, weight_of
from tests.support.linear_formulas import Arithmetic, arithmetic_of, assert_lora_merged, merged_weight
from tests.support.problems import DTYPES, dtype_name, gaussian
from tests.support.tolerances import assert_within


def operands(N, K, r, dtype, blocksize=64, double=True):
    with qk.use_backend("reference"):
        packed, state = qk.quantize_nf4(gaussian(N, K) / K**0.5, blocksize, double)
        w = qk.dequantize_nf4(packed, state, torch.float32)
    A, B = ((gaussian(*size, seed=4) * 0.2).to(dtype).float() for size in ((r, K), (N, r)))
    return weight_of("test", packed, state), w, LoRA(A, B, None, 1.7, 0.0)


def check_merged_weight(dtype, N, K, r, blocksize=64, double=True):
    weight, w, lora = operands(N, K, r, dtype, blocksize, double)
    out = torch.full((N, K), torch.nan, dtype=dtype)
    merge_lora(weight, lora, out)
    assert_within(out, merged_weight(w, lora.A, lora.B, lora.scaling, Arithmetic(dtype, composed=False)), "W'")
    if dtype != torch.float32:
        once = (w + lora.scaling * (lora.B @ lora.A)).to(dtype)
        assert (out != once).float().mean() < 0.01, "one rounding; sums of another order may cross a boundary"


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
        gradients = linear_nf4_lora_merged_backward(grad_y, x, weight, lora, need_grad_x=True)
    inputs = (x, w, bias, lora.A, lora.B, grad_y)
    assert_lora_merged((y, *gradients), inputs, lora.scaling, arithmetic_of("triton", dtype))
