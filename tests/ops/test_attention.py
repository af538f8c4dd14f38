"""Attention against float64 within the bounds of an error analysis, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qlora_kernels as qk
from tests.support.attention_formula import attention as formula
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_repeats, assert_same_function, assert_within

backends = pytest.mark.parametrize("backend", usable_backends("attention"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

SHAPES = {  # B, H, KV, T, D
    "one token": (1, 2, 1, 1, 8),
    "one block": (2, 4, 2, 33, 64),
    "two blocks": (1, 3, 3, 101, 80),
    "odd head": (1, 2, 1, 20, 7),
    "96": (1, 2, 1, 40, 96),
    "128": (1, 2, 2, 97, 128),
    "256": (1, 2, 1, 35, 256),
}


def heads(shape, dtype):
    """Return q, k, v and grad_out in the memory layout of a model's projections, [B, T, heads, D]."""
    B, H, KV, T, D = SHAPES[shape]
    made = [gaussian(B, T, n, D, seed=i, dtype=dtype).transpose(1, 2) for i, n in enumerate((H, KV, KV, H))]
    return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(made)]


def run(backend, tensors, **options):
    """Return out and the gradients of q, k and v."""
    q, k, v, grad_out = tensors
    with qk.use_backend(backend):
        out = qk.attention(q, k, v, **options)
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    return out.detach(), *gradients


def assert_attention(results, tensors, visible, **options):
    expected = formula(*[t.detach() for t in tensors], visible, **options)
    wanted = (expected.out, expected.grad_q, expected.grad_k, expected.grad_v)
    for name, actual, want in zip(("out", "grad_q", "grad_k", "grad_v"), results, wanted, strict=True):
        assert actual.dtype == tensors[0].dtype
        assert_within(actual, want, name)


def causal(B, T):
    return torch.ones(B, T, T, dtype=torch.bool).tril()


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_attention_and_its_gradients(backend, dtype, shape):
    tensors = heads(shape, dtype)
    B, _, _, T, _ = SHAPES[shape]
    assert_attention(run(backend, tensors), tensors, causal(B, T))


@backends
@dtypes
def test_softcap_and_scale(backend, dtype):
    tensors = heads("two blocks", dtype)
    options = {"scale": 0.3, "softcap": 2.0}
    assert_attention(run(backend, tensors, **options), tensors, causal(1, 101), **options)


@backends
@pytest.mark.parametrize("window", [1, 5, 60])
def test_window_hides_distant_keys(backend, window):
    tensors = heads("two blocks", torch.float32)
    visible = causal(1, 101) & ~causal(1, 101).tril(-window)
    assert_attention(run(backend, tensors, window=window), tensors, visible)


@backends
@dtypes
def test_documents(backend, dtype):
    """Packed rows are block-diagonal; a number that occurs again later is another document."""
    tensors = heads("one block", dtype)
    documents = torch.tensor([[4] * 11 + [2] * 1 + [4] * 21, [0] * 33])
    run_of = (documents[:, 1:] != documents[:, :-1]).long().cumsum(1)
    run_of = torch.cat([torch.zeros(2, 1, dtype=torch.int64), run_of], 1)
    same = run_of[:, :, None] == run_of[:, None, :]
    assert_attention(run(backend, tensors, documents=documents), tensors, causal(2, 33) & same)
    results = run(backend, tensors, documents=documents, causal=False)
    assert_attention(results, tensors, same)


@backends
@dtypes
def test_left_and_right_padding(backend, dtype):
    """Padded queries have no keys: their output and gradient are zero, and they do not affect other queries."""
    tensors = heads("one block", dtype)
    first, last = torch.tensor([[0], [9]]), torch.tensor([[20], [33]])
    place = torch.arange(33)
    inside = (place >= first) & (place < last)
    ranges = (torch.where(inside, first, 0), torch.where(inside, last, 0))
    results = run(backend, tensors, key_ranges=ranges)
    visible = causal(2, 33) & inside[:, :, None] & inside[:, None, :]
    assert_attention(results, tensors, visible)
    out, grad_q, grad_k, grad_v = results
    for tensor in (out, grad_q, grad_k, grad_v):
        padded = ~inside[:, None, :].expand(-1, tensor.shape[1], -1)
        assert (tensor[padded] == 0).all()


@backends
@pytest.mark.parametrize(("Tq", "Tk"), [(5, 120), (120, 5), (1, 97)])
def test_different_numbers_of_queries_and_keys(backend, Tq, Tk):
    q, k, v, grad_out = (gaussian(1, 2, T, 16, seed=i) for i, T in enumerate((Tq, Tk, Tk, Tq)))
    tensors = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad_out]
    assert_attention(run(backend, tensors, causal=False), tensors, torch.ones(1, Tq, Tk, dtype=torch.bool))


@backends
@pytest.mark.parametrize("rise", [10, 100])
def test_scores_increasing_along_keys(backend, rise):
    """The running maximum rises in each block of keys: by a factor of e^rise in the CPU kernel's second block of 96."""
    tensors = [t.detach() for t in heads("two blocks", torch.float32)]
    tensors[1] = tensors[1] + torch.arange(101)[None, None, :, None] * tensors[0].mean(2, keepdim=True) / 2
    tensors[0][..., 0] = 4.0
    tensors[1][..., 0] = rise * 80**0.5 / 4.0 * (torch.arange(101) >= 96)
    tensors = [t.requires_grad_(i < 3) for i, t in enumerate(tensors)]
    assert_attention(run(backend, tensors), tensors, causal(1, 101))


@backends
@dtypes
def test_strides_do_not_change_the_bits(backend, dtype):
    tensors = heads("one block", dtype)
    T = tensors[0].shape[2]
    packed = [t.detach().contiguous().requires_grad_(i < 3) for i, t in enumerate(tensors)]
    for strided, contiguous in zip(run(backend, tensors), run(backend, packed), strict=True):
        assert_repeats(strided, contiguous, backend, products=5, terms=T)
    shared = [t.detach()[:, :1].expand_as(t) for t in tensors]
    results = run(backend, [t.requires_grad_(i < 3) for i, t in enumerate(shared)])
    own = [t.detach().clone().requires_grad_(i < 3) for i, t in enumerate(shared)]
    for result, expected in zip(results, run(backend, own), strict=True):
        assert_repeats(result, expected, backend, products=5, terms=T)


@backends
def test_layout_of_the_output(backend):
    """The memory layout is [B, T, H, D], so that the output projection reads a view."""
    q, k, v, _ = heads("one block", torch.float32)
    with qk.use_backend(backend):
        out = qk.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()


def test_formula_equals_torch():
    """The formula used by the other tests equals scaled_dot_product_attention in float64."""
    q, k, v, grad_out = (t.detach().double().requires_grad_() for t in heads("one block", torch.float32))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    expected = formula(*[t.detach() for t in (q, k, v, grad_out)], causal(2, 33))
    for actual, want in zip(
        (out, *gradients), (expected.out, expected.grad_q, expected.grad_k, expected.grad_v), strict=True
    ):
        assert torch.allclose(actual, want.value, rtol=1e-10, atol=1e-12)


@backends
def test_second_derivatives_and_forward_mode(backend):
    q, k, v, grad_out = (t.detach().requires_grad_() for t in heads("odd head", torch.float32))

    def ours(q, k, v):
        return qk.attention(q, k, v, softcap=3.0)

    def dense(q, k, v):
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        z = 3 * torch.tanh(q @ k.transpose(-1, -2) * 7**-0.5 / 3)
        return z.masked_fill(~causal(1, 20)[:, None], -float("inf")).softmax(-1) @ v

    def second(function):
        gradients = torch.autograd.grad(function(q, k, v), (q, k, v), grad_out, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), (q, k, v, grad_out))

    def tangent(function):
        inputs = tuple(t.detach() for t in (q, k, v))
        return torch.func.jvp(function, inputs, inputs)

    with qk.use_backend(backend):
        for derivative in (second, tangent):
            for actual, expected in zip(derivative(ours), derivative(dense), strict=True):
                assert_same_function(actual, expected)


@backends
def test_opcheck(backend):
    q, k, v, grad_out = heads("one token", torch.float32)
    keys = (torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64), 0.5, 0.0)
    with qk.use_backend(backend):
        torch.library.opcheck(torch.ops.qlora_kernels.attention, (q, k, v, *keys))
        out, log_sums = torch.ops.qlora_kernels.attention(*(t.detach() for t in (q, k, v)), *keys)
        arguments = (grad_out.transpose(1, 2), *(t.detach() for t in (q, k, v)), out, log_sums, *keys)
        torch.library.opcheck(torch.ops.qlora_kernels.attention_backward, arguments)


@backends
def test_no_queries_give_an_empty_output(backend):
    q, k, v, _ = heads("one block", torch.float32)
    with qk.use_backend(backend):
        assert qk.attention(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (2, 4, 0, 64)


def test_refuses_bad_arguments():
    q, k, v, _ = (t.detach() for t in heads("one block", torch.float32))
    call = qk.attention
    with pytest.raises(NotImplementedError, match=r"attention: dropout_p must be 0, got 0.1"):
        call(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"attention: causal and documents need as many queries as keys, got Tq=3"):
        call(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"attention: q must have a multiple of k's 2 heads, got 3"):
        call(q[:, :3], k, v)
    with pytest.raises(ValueError, match=r"attention: v must have the shape of k"):
        call(q, k, v[..., :32])
    with pytest.raises(TypeError, match=r"attention: k must have the dtype of q, torch.float32"):
        call(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match=r"attention: window must be at least 1 and causal True, got window=0"):
        call(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"attention: starts and ends must lie in \[0, Tk=33\], got 0 and 34"):
        call(q, k, v, causal=False, key_ranges=(torch.zeros(2, 33).long(), torch.full((2, 33), 34)))
    with pytest.raises(ValueError, match=r"attention: key_ranges: starts must be int64 \(2, 33\)"):
        call(q, k, v, key_ranges=(torch.zeros(2, 32).long(), torch.zeros(2, 33).long()))
    with pytest.raises(ValueError, match=r"attention: documents must be int64 \(2, 33\)"):
        call(q, k, v, documents=torch.zeros(2, 33))
    with pytest.raises(ValueError, match=r"attention: softcap must be positive and finite, got -1.0"):
        call(q, k, v, softcap=-1.0)
    with pytest.raises(ValueError, match=r"attention: q and k must have four dimensions"):
        call(q[0], k[0], v[0])
