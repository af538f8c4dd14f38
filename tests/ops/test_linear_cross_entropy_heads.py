"""linear_cross_entropy of heads in NF4, with low-rank columns and with LoRA, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qlora_kernels as qk
from qlora_kernels.ops.linear_cross_entropy import nf4_fields
from qlora_kernels.ops.output_head import Head
from tests.support.cross_entropy_formula import linear_cross_entropy as formula
from tests.support.problems import dtype_name, gaussian
from tests.support.tolerances import assert_same_function, assert_within

from .cross_entropy_problems import PIECES, SHAPES, backends, dtypes, problem


def nf4_head(V, K, *, blocksize=64, double_quant=True):
    """(packed, state) of a head with logits of the usual size."""
    return qk.quantize_nf4(3 * gaussian(V, K, seed=1) / K**0.5, blocksize=blocksize, double_quant=double_quant)


@backends
@dtypes
@pytest.mark.parametrize(("blocksize", "double_quant"), [(32, True), (4096, False)])
def test_nf4_head(backend, dtype, blocksize, double_quant, monkeypatch):
    """The losses and gradients of the dequantized head; rows start within a block, and a part within a group."""
    monkeypatch.setattr("qlora_kernels.ops.output_head.DECODED_BYTES", 65 * 4 * 199)
    shape = "blocks and chunks that are not full"
    _, V, K = SHAPES[shape]
    hidden, _, labels, bias = problem(shape, dtype, bias=True)
    packed, state = nf4_head(V, K, blocksize=blocksize, double_quant=double_quant)
    hidden.requires_grad_()
    with qk.use_backend(backend):
        losses = qk.linear_cross_entropy(hidden, packed, labels, bias, state=state, softcap=9.0, reduction="none")
        losses.sum().backward()
    dense = qk.dequantize_nf4(packed, state, dtype)
    expected = formula(hidden, dense, labels, bias, softcap=9.0, rounds_gradient=backend == "triton")
    assert_within(losses, expected.losses, "losses")
    assert_within(hidden.grad, expected.rows, "grad_hidden")


@backends
@dtypes
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    "shape", ["one token", "one column beyond a chunk", "a long contraction", "low-rank columns in two pieces"]
)
def test_low_rank_columns(backend, dtype, shape, nf4, monkeypatch):
    """The op's own contract: columns of hidden beyond the weight's meet the factor low_rank."""
    monkeypatch.setattr("qlora_kernels.ops.output_head.DECODED_BYTES", 37 * 4 * 99)
    M, V, K = (SHAPES | PIECES)[shape]
    hidden, weight, labels, _ = problem(shape, dtype, weight_dtype=torch.bfloat16)
    hidden = torch.cat([hidden, gaussian(M, 5, dtype=dtype, seed=7)], dim=1).requires_grad_()
    low_rank = gaussian(V, 5, seed=8) / 3
    head = Head(weight, None, -100, 1.0, 0.0, low_rank)
    if nf4:
        packed, state = nf4_head(V, K)
        weight = qk.dequantize_nf4(packed, state, dtype)
        head = head._replace(weight=packed, **nf4_fields(state))
    with qk.use_backend(backend):
        losses, _, _ = torch.ops.qlora_kernels.linear_cross_entropy(hidden, labels, *head, True)
        losses.sum().backward()
    whole = torch.cat([weight.to(dtype), low_rank.to(dtype)], dim=1)
    expected = formula(hidden, whole, labels, rounds_gradient=backend == "triton")
    assert_within(losses, expected.losses, "losses")
    assert_within(hidden.grad, expected.rows, "grad_hidden")


@backends
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_adapted_head(backend, dtype, nf4, monkeypatch):
    """All gradients are those of logits = hidden (W + scaling B A)^T + bias; the factors' come in their own dtype."""
    monkeypatch.setattr("qlora_kernels.ops.linear_cross_entropy.VOCABULARY_CHUNK", 100)
    shape = "blocks and chunks that are not full"
    hidden, weight, labels, _ = problem(shape, dtype)
    (V, K), r = weight.shape, 3
    packed, state = nf4_head(V, K)
    given = (packed, labels) if nf4 else (weight, labels)
    weight = qk.dequantize_nf4(packed, state, dtype) if nf4 else weight
    A, B, bias = gaussian(r, K, seed=5) / 8, gaussian(V, r, seed=6) / 2, gaussian(V, seed=3)
    factors = gaussian(len(labels), seed=4)
    learned = [t.requires_grad_() for t in (hidden, A, B, bias)]
    with qk.use_backend(backend):
        losses = qk.linear_cross_entropy(
            hidden, *given, bias, state=state if nf4 else None, lora_A=A, lora_B=B, scaling=0.5, reduction="none"
        )
        actual = torch.autograd.grad(losses, learned, factors)
    used = [t.double() if t is bias else t.to(dtype).double() for t in (hidden, A, B, bias)]
    leaves = [t.detach().requires_grad_() for t in used]
    x, a, b, c = leaves
    logits = x @ (weight.double() + 0.5 * b @ a).T + c
    expected = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="none"), leaves, factors.double())
    assert [t.dtype for t in actual] == [dtype, torch.float32, torch.float32, torch.float32]
    for name, got, want in zip(("hidden", "lora_A", "lora_B", "bias"), actual, expected, strict=True):
        if dtype == torch.bfloat16:  # of the hidden states, s and the probabilities, in the units of the largest
            assert (got.double() - want).abs().max() <= 2**-6 * want.abs().max(), name
        else:
            assert_same_function(got, want.float(), name, products=4)


@backends
def test_adapted_head_has_second_derivatives_and_forward_mode(backend):
    hidden, weight, labels, _ = problem("one chunk", torch.float32)
    packed, state = nf4_head(*weight.shape)
    dense = qk.dequantize_nf4(packed, state, torch.float32)
    inputs = tuple(t.requires_grad_() for t in (hidden, gaussian(2, 64, seed=5) / 8, gaussian(256, 2, seed=6)))

    def ours(x, A, B):
        return qk.linear_cross_entropy(x, packed, labels, state=state, lora_A=A, lora_B=B)

    def plain(x, A, B):
        return F.cross_entropy(x @ (dense + B @ A).T, labels)

    def second(function):
        grads = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), inputs)

    def tangent(function):
        values = tuple(t.detach() for t in inputs)
        return torch.func.jvp(function, values, values)

    with qk.use_backend(backend):
        for derivative in (second, tangent):
            for actual, expected in zip(derivative(ours), derivative(plain), strict=True):
                assert_same_function(actual, expected, products=4)


@backends
def test_opcheck_of_an_adapted_nf4_head(backend):
    hidden, _, labels, bias = problem("one chunk", torch.float32, bias=True)
    packed, state = nf4_head(256, 61)
    head = Head(packed, bias, -100, 1.0, 0.0, gaussian(256, 3, seed=4).requires_grad_(), **nf4_fields(state))
    with qk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_cross_entropy, (hidden.requires_grad_(), labels, *head, True)
        )


def test_refuses_bad_adapted_heads():
    hidden, weight, labels, _ = problem("one chunk", torch.float32)
    packed, state = nf4_head(*weight.shape)
    A, B = gaussian(2, 64), gaussian(256, 2)
    call = qk.linear_cross_entropy
    with pytest.raises(ValueError, match=r"lora_A and lora_B must be given together, got no lora_B"):
        call(hidden, weight, labels, lora_A=A)
    with pytest.raises(ValueError, match=r"lora_A must have shape \[r, K=64\], got \(2, 63\)"):
        call(hidden, weight, labels, lora_A=A[:, 1:], lora_B=B)
    with pytest.raises(ValueError, match=r"lora_B must have shape \[V=256, r=2\], got \(255, 2\)"):
        call(hidden, packed, labels, state=state, lora_A=A, lora_B=B[1:])
    with pytest.raises(TypeError, match=r"linear_cross_entropy: lora_B must be float32, bfloat16 or float16"):
        call(hidden, weight, labels, lora_A=A, lora_B=B.double())
    with pytest.raises(TypeError, match=r"linear_cross_entropy: packed must be torch.uint8, got torch.float32"):
        call(hidden, weight, labels, state=state)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: hidden.shape\[-1\] must equal K=64"):
        call(hidden[:, 1:], packed, labels, state=state)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: packed must have 8192 elements, got 8191"):
        call(hidden, packed[1:], labels, state=state)
    with pytest.raises(TypeError, match=r"linear_cross_entropy: weight must be float32, bfloat16 or float16"):
        call(hidden, packed, labels)
