"""Under torch.autocast an op computes in the dtype of its arguments, as its fake does; layers cast x before it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import LoRA, weight_of
from qlora_kernels.ops.registry import unavailable
from tests.support.problems import gaussian
from tests.support.tolerances import assert_same_function

M, N, K, R = 5, 24, 64, 4
OPS = torch.ops.qlora_kernels


def results(op, backend, dtype, *, trained):
    """Return y and, if `trained`, the gradients of x and lora_A."""
    with qk.use_backend("reference"):
        packed, state = qk.quantize_nf4(gaussian(N, K))
    weight = weight_of("test", packed, state)
    x, A = (gaussian(rows, K, seed=rows, dtype=dtype).requires_grad_(trained) for rows in (M, R))
    lora = LoRA(A, gaussian(N, R, seed=3, dtype=dtype), None, 0.7, 0.0)
    calls = {
        "linear_nf4": lambda: OPS.linear_nf4(x, *weight, None),
        "linear_nf4_lora": lambda: OPS.linear_nf4_lora(x, *weight, None, *lora)[0],
        "linear_nf4_lora_merged": lambda: OPS.linear_nf4_lora_merged(x, *weight, None, *lora),
    }
    with qk.use_backend(backend):
        y = calls[op]()
        leaves = [x] if op == "linear_nf4" else [x, A]
        return [y, *(torch.autograd.grad(y.sum(), leaves) if trained else ())]


@pytest.mark.parametrize("mode", ["trained", "inference"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", ["linear_nf4", "linear_nf4_lora", "linear_nf4_lora_merged"])
def test_results_have_the_dtype_of_the_arguments(op, backend, mode):
    if (reason := unavailable(backend)) is not None:
        pytest.skip(reason)
    for dtype, autocast in ((torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)):
        with torch.inference_mode() if mode == "inference" else nullcontext():
            expected = results(op, backend, dtype, trained=mode == "trained")
            with torch.autocast("cpu", autocast):
                actual = results(op, backend, dtype, trained=mode == "trained")
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == dtype
            assert_same_function(one, other, op, products=4, terms=K, arithmetic=dtype)
