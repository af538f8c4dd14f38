"""Problems of linear_nf4_multi_lora, and their comparison with float64."""

from __future__ import annotations

import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import MultiLoRA, weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import Arithmetic, Dropout, assert_multi_lora
from tests.support.problems import Shape, gaussian
from tests.support.tolerances import assert_within, exactly, total

SHAPES = (Shape(0, 32, 64), Shape(7, 33, 96), Shape(19, 130, 257, r=8), Shape(64, 96, 128, r=16))
N_ADAPTERS = 3
SCALINGS = torch.tensor([2.0, 0.5, 1.0])


def check_forward_and_gradients(backend, dtype, shape, p):
    """Compare outputs and all gradients of the op with float64."""
    packed, state = qk.quantize_nf4(gaussian(shape.N, shape.K, seed=1) / shape.K**0.5)
    adapter = torch.randint(-1, N_ADAPTERS, (shape.M,), generator=torch.Generator().manual_seed(0))
    leaves = {
        "x": gaussian(shape.M, shape.K, dtype=dtype),
        "lora_A": (gaussian(N_ADAPTERS, shape.r, shape.K, seed=2) / shape.K**0.5).to(dtype).float(),
        "lora_B": gaussian(N_ADAPTERS, shape.N, shape.r, seed=3).to(dtype).float(),
        "bias": gaussian(shape.N, seed=4, dtype=dtype),
    }
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    grad_y, seed = gaussian(shape.M, shape.N, dtype=dtype, seed=5), torch.tensor([77])
    x, lora_A, lora_B, bias = leaves.values()
    lora = MultiLoRA(lora_A, lora_B, SCALINGS, adapter, seed, p)
    with qk.use_backend(backend):
        y, s = torch.ops.qlora_kernels.linear_nf4_multi_lora(x, *weight_of("test", packed, state), bias, *lora)
        y.backward(grad_y)
    dropout = Dropout(dropout_keep(seed, shape.M, shape.K, p), keep_scale(p)) if p else None
    w = qk.dequantize_nf4(packed, state, dtype)
    results = (y, s, x.grad, lora_A.grad, lora_B.grad)
    inputs = (x, w, bias, lora_A, lora_B, grad_y)
    # This includes the CPU, where torch computes the low-rank part (ops/composed_multi_lora.py).
    arithmetic = Arithmetic(dtype, weight_may_be_exact=backend == "triton")
    assert_multi_lora(results, inputs, SCALINGS, adapter, dropout, arithmetic)
    assert_within(bias.grad, total(exactly(grad_y)).to(dtype), "grad of bias")
