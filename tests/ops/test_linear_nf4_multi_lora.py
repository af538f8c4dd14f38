"""Class 2 (matmul): every row with its own adapter equals that row alone with that adapter."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops._operands import weight_of
from qlora_kernels.ops._philox import dropout_keep, keep_scale
from tests.support.problems import DTYPES, Shape, dtype_name, gaussian, usable_backends
from tests.support.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_baseline

backends = pytest.mark.parametrize("backend", usable_backends("linear_nf4_multi_lora"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
SHAPES = (Shape(0, 32, 64), Shape(7, 33, 96), Shape(19, 130, 257, r=8), Shape(64, 96, 128, r=16))
N_ADAPTERS = 3
SCALINGS = torch.tensor([2.0, 0.5, 1.0])


def composed(x, w, bias, lora_A, lora_B, adapter, keep, p):
    """Row by row, by indexing every row's own factors."""
    chosen = adapter.clamp(min=0)
    scale = (SCALINGS.to(x.dtype)[chosen] * (adapter >= 0)).unsqueeze(1)
    dropped = x if keep is None else torch.where(keep, x * keep_scale(p), 0.0)
    s = torch.einsum("mk,mrk->mr", dropped, lora_A[chosen])
    return x @ w.T + bias + scale * torch.einsum("mr,mnr->mn", s, lora_B[chosen])


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
    with qk.use_backend(backend):
        y = qk.linear_nf4_multi_lora(
            leaves["x"],
            packed,
            state,
            leaves["lora_A"],
            leaves["lora_B"],
            SCALINGS,
            adapter,
            leaves["bias"],
            dropout_p=p,
            seed=seed,
        )
        y.backward(grad_y)
    keep = dropout_keep(seed, shape.M, shape.K, p) if p else None
    w = qk.dequantize_nf4(packed, state, dtype)

    def run(kind):
        copies = {name: t.detach().to(kind).requires_grad_() for name, t in leaves.items()}
        out = composed(copies["x"], w.to(kind), copies["bias"], copies["lora_A"], copies["lora_B"], adapter, keep, p)
        out.backward(grad_y.to(kind))
        return out.detach(), {name: t.grad for name, t in copies.items()}

    baseline, baseline_grads = run(dtype)
    exact, exact_grads = run(torch.float64)
    assert_within_baseline(y.detach(), baseline, exact, factor=FORWARD_FACTOR, name="y")
    for name, leaf in leaves.items():
        assert_within_baseline(
            leaf.grad.to(dtype), baseline_grads[name], exact_grads[name], factor=GRADIENT_FACTOR, name=f"grad of {name}"
        )


@backends
def test_minus_one_is_the_base(backend):
    packed, state = qk.quantize_nf4(gaussian(32, 64))
    x = gaussian(5, 64)
    factors = gaussian(2, 4, 64), gaussian(2, 32, 4), torch.ones(2)
    with qk.use_backend(backend):
        y = qk.linear_nf4_multi_lora(x, packed, state, *factors, torch.full((5,), -1))
        assert torch.equal(y, qk.linear_nf4(x, packed, state))


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
    x, A, B = gaussian(3, 96).requires_grad_(), gaussian(2, 4, 96).requires_grad_(), gaussian(2, 8, 4).requires_grad_()
    adapter = torch.tensor([1, -1, 0])
    with qk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4_multi_lora,
            (x, *weight_of("opcheck", packed, state), None, A, B, torch.ones(2), adapter, None, 0.0),
        )
