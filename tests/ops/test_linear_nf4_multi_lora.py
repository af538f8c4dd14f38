"""Class 2 (matmul): every row with its own adapter equals that row computed separately."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import MultiLoRA, weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import Arithmetic, Dropout, assert_multi_lora
from tests.support.problems import DTYPES, Shape, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_repeats, assert_within, exactly, model_error, total

backends = pytest.mark.parametrize("backend", usable_backends("linear_nf4_multi_lora"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
SHAPES = (Shape(0, 32, 64), Shape(7, 33, 96), Shape(19, 130, 257, r=8), Shape(64, 96, 128, r=16))
N_ADAPTERS = 3
SCALINGS = torch.tensor([2.0, 0.5, 1.0])


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_gradients(backend, dtype, shape, p):
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


@backends
def test_minus_one_is_the_base(backend):
    packed, state = qk.quantize_nf4(gaussian(32, 64))
    x = gaussian(5, 64)
    factors = gaussian(2, 4, 64), gaussian(2, 32, 4), torch.ones(2)
    with qk.use_backend(backend):
        y = qk.linear_nf4_multi_lora(x, packed, state, *factors, torch.full((5,), -1))
        assert_repeats(y, qk.linear_nf4(x, packed, state), backend, terms=64)


def test_refuses_bad_arguments():
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    x, A, B, scalings = torch.zeros(3, 64), torch.zeros(2, 4, 64), torch.zeros(2, 8, 4), torch.ones(2)
    with pytest.raises(ValueError, match=r"adapter must be int64 \[M=3\], got torch.int64 \(2,\)"):
        qk.linear_nf4_multi_lora(x, packed, state, A, B, scalings, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"lora_B must have shape \[E=2, N=8, r=4\], got \(1, 8, 4\)"):
        qk.linear_nf4_multi_lora(x, packed, state, A, B[:1], scalings, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"scalings must be float32 \[E=2\]"):
        qk.linear_nf4_multi_lora(x, packed, state, A, B, scalings[:1], torch.zeros(3, dtype=torch.int64))


@backends
def test_opcheck(backend):
    packed, state = qk.quantize_nf4(gaussian(8, 96))
    x, A = gaussian(3, 96).requires_grad_(), (gaussian(2, 4, 96) / 96**0.5).requires_grad_()
    B, adapter = gaussian(2, 8, 4).requires_grad_(), torch.tensor([1, -1, 0])
    # Eager and traced calls of the reference may add in another order; no result exceeds 50.
    error = model_error(products=3, terms=96) if backend == "reference" else None
    with qk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4_multi_lora,
            (x, *weight_of("opcheck", packed, state), None, A, B, torch.ones(2), adapter, None, 0.0),
            rtol=error,
            atol=None if error is None else 50 * error,
        )


@pytest.mark.parametrize("backend", usable_backends("linear_nf4_multi_lora"))
def test_adapter_number_out_of_range(backend):
    """An error if the numbers are on the host; on a GPU, which would have to synchronize, only the base is computed."""
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    x, A, B = gaussian(3, 64), gaussian(2, 4, 64), gaussian(2, 8, 4)
    adapter = torch.tensor([0, 2**40, -1])
    with qk.use_backend(backend):
        try:
            y = qk.linear_nf4_multi_lora(x, packed, state, A, B, torch.ones(2), adapter)
        except (IndexError, RuntimeError):
            return
        assert_repeats(y[1:], qk.linear_nf4(x, packed, state)[1:], backend, terms=64)
