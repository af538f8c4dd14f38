"""Class 2 (matmul): the fused LoRA linear and its three gradients, with and without dropout."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import LoRA, weight_of
from qlora_kernels.ops.philox import DRAW_BITS, dropout_keep, keep_scale, keep_threshold, philox
from tests.support.linear_formulas import Dropout, arithmetic_of, assert_lora
from tests.support.problems import DTYPES, SHAPES, Shape, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_same_function, assert_within, exactly, total

backends = pytest.mark.parametrize("backend", usable_backends("linear_nf4_lora"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
RANKS = (Shape(6, 50, 128, r=64), Shape(5, 40, 192, r=256))
SCALING = 2.0


def problem(shape, dtype, master):
    packed, state = qk.quantize_nf4(gaussian(shape.N, shape.K, seed=1) / shape.K**0.5, shape.blocksize)
    leaves = {
        "x": gaussian(shape.M, shape.K, dtype=dtype),
        "lora_A": (gaussian(shape.r, shape.K, seed=2) / shape.K**0.5).to(dtype).to(master),
        "lora_B": (gaussian(shape.N, shape.r, seed=3)).to(dtype).to(master),
        "bias": gaussian(shape.N, seed=4, dtype=dtype),
    }
    return packed, state, {name: t.requires_grad_() for name, t in leaves.items()}


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES + RANKS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_gradients(backend, dtype, shape, p):
    packed, state, leaves = problem(shape, dtype, torch.float32)
    grad_y = gaussian(shape.M, shape.N, dtype=dtype, seed=5)
    seed = torch.tensor([0x1234567890ABCDEF])
    x, lora_A, lora_B, bias = leaves.values()
    lora = LoRA(lora_A, lora_B, seed, SCALING, p)
    with qk.use_backend(backend):
        y, s = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight_of("test", packed, state), bias, *lora)
        y.backward(grad_y)
    assert y.dtype == dtype
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())

    w = qk.dequantize_nf4(packed, state, dtype)
    dropout = Dropout(dropout_keep(seed, shape.M, shape.K, p), keep_scale(p)) if p else None
    results = (y, s, x.grad, lora_A.grad, lora_B.grad)
    inputs = (x, w, bias, lora_A, lora_B, grad_y)
    assert_lora(results, inputs, SCALING, dropout, arithmetic_of(backend, dtype))
    assert_within(bias.grad, total(exactly(grad_y)).to(dtype), "grad of bias")


@backends
def test_grad_x_only_where_needed(backend):
    packed, state = qk.quantize_nf4(gaussian(32, 64))
    x = gaussian(3, 64)
    lora_A, lora_B = gaussian(4, 64).requires_grad_(), gaussian(32, 4).requires_grad_()
    with qk.use_backend(backend):
        qk.linear_nf4_lora(x, packed, state, lora_A, lora_B, scaling=1.0).sum().backward()
    assert x.grad is None
    assert lora_A.grad is not None


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("x", "lora_A"), ("x", "lora_B")])
def test_gradients_of_frozen_factors_are_not_computed(backend, dtype, p, frozen):
    """LoRA-FA freezes A. The other gradients keep their bits, and the op returns nothing for the frozen ones.

    Without grad_B, Triton computes ds = grad_y B by another kernel, whose order of summation is another one.
    """
    packed, state, leaves = problem(Shape(6, 50, 128), dtype, torch.float32)
    x, lora_A, lora_B, _ = leaves.values()
    lora, weight = LoRA(lora_A, lora_B, torch.tensor([7]), SCALING, p), weight_of("test", packed, state)
    grad_y = gaussian(6, 50, dtype=dtype, seed=5)
    names = ("x", "lora_A", "lora_B")
    needs = [name not in frozen for name in names]
    with qk.use_backend(backend):
        y, s = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight, None, *lora)
        every = torch.autograd.grad(y, (x, lora_A, lora_B), grad_y)
        for name in frozen:
            leaves[name].requires_grad_(False)
        y, s = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight, None, *lora)
        wanted = [leaves[name] for name, need in zip(names, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad_y)) if wanted else iter(())
        of_op = torch.ops.qlora_kernels.linear_nf4_lora_backward(
            grad_y, x.detach(), s.detach(), *weight, lora_A.detach(), lora_B.detach(), *lora[2:], *needs
        )
    other_order = backend == "triton" and "lora_B" in frozen
    for expected, returned, need in zip(every, of_op, needs, strict=True):
        if need and other_order:
            assert_same_function(returned, expected, products=3, terms=50)
            assert_same_function(next(found), expected, products=3, terms=50)
        else:
            assert torch.equal(returned, expected) if need else returned.numel() == 0
            assert not need or torch.equal(next(found), expected)


@backends
def test_no_weight_sized_tensor_is_saved(backend):
    """Only x, s and the weight's own bytes are kept for backward: no dequantized weight, no mask."""
    packed, state = qk.quantize_nf4(gaussian(64, 128))
    x = gaussian(3, 128).requires_grad_()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with qk.use_backend(backend), hooks:
        qk.linear_nf4_lora(
            x,
            packed,
            state,
            gaussian(4, 128).requires_grad_(),
            gaussian(64, 4).requires_grad_(),
            scaling=1.0,
            dropout_p=0.5,
        )
    owned = {t.untyped_storage().data_ptr() for t in (packed, *state.constants) if t is not None}
    rest = [t for t in saved if t.untyped_storage().data_ptr() not in owned]
    assert all(t.numel() < 64 * 128 for t in rest)
    assert sum(t.numel() == x.numel() for t in rest) == 1


def test_philox_known_answer():
    """Published vectors of Random123 for philox4x32-10."""
    zeros = philox(0, torch.zeros(1, dtype=torch.int64))[0].tolist()
    assert zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_rate_and_scale():
    keep = dropout_keep(torch.tensor([7]), 1000, 1000, 0.1)
    assert abs(keep.double().mean().item() - 0.9) < 0.002
    effective = 1 - keep_threshold(0.1) / 2**DRAW_BITS
    assert keep_scale(0.1) == 1 / effective


def test_seed_is_drawn_from_torch_generator():
    packed, state = qk.quantize_nf4(gaussian(32, 64))
    x, lora_A, lora_B = gaussian(5, 64), gaussian(4, 64), gaussian(32, 4)

    def run():
        return qk.linear_nf4_lora(x, packed, state, lora_A, lora_B, scaling=1.0, dropout_p=0.5)

    torch.manual_seed(0)
    first, second = run(), run()
    torch.manual_seed(0)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


def test_refuses_bad_arguments():
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    x = torch.zeros(3, 64)
    with pytest.raises(ValueError, match=r"linear_nf4_lora: lora_A must have shape \[r, K=64\], got \(4, 63\)"):
        qk.linear_nf4_lora(x, packed, state, torch.zeros(4, 63), torch.zeros(8, 4), scaling=1.0)
    with pytest.raises(ValueError, match=r"linear_nf4_lora: lora_B must have shape \[N=8, r=4\], got \(8, 5\)"):
        qk.linear_nf4_lora(x, packed, state, torch.zeros(4, 64), torch.zeros(8, 5), scaling=1.0)
    with pytest.raises(ValueError, match=r"linear_nf4_lora: dropout_p must lie in \[0, 1\), got 1.0"):
        qk.linear_nf4_lora(x, packed, state, torch.zeros(4, 64), torch.zeros(8, 4), scaling=1.0, dropout_p=1.0)


@backends
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(backend, p):
    packed, state = qk.quantize_nf4(gaussian(8, 96))
    x, bias = gaussian(3, 96).requires_grad_(), gaussian(8).requires_grad_()
    lora_A, lora_B = gaussian(4, 96).requires_grad_(), gaussian(8, 4).requires_grad_()
    seed = torch.tensor([3]) if p else None
    weight = weight_of("opcheck", packed, state)
    with qk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4_lora,
            (x, *weight, bias, lora_A, lora_B, seed, 0.5, p),
        )
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4_lora_backward,
            (
                gaussian(3, 8),
                x.detach(),
                gaussian(3, 4),
                *weight,
                lora_A.detach(),
                lora_B.detach(),
                seed,
                0.5,
                p,
                True,
                True,
                p > 0,
            ),
        )
