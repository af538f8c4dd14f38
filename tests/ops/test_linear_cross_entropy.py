"""linear_cross_entropy against float64 within the bounds of an error analysis, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qlora_kernels as qk
from qlora_kernels.ops.linear_cross_entropy import nf4_fields
from qlora_kernels.ops.output_head import Head
from tests.support.cross_entropy_formula import linear_cross_entropy as formula
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_same_function, assert_within

OP = "linear_cross_entropy"
backends = pytest.mark.parametrize("backend", usable_backends(OP))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

SHAPES = {
    "one token": (1, 5, 3),
    "blocks and chunks that are not full": (261, 517, 65),
    "one chunk": (13, 256, 64),
    "one column beyond a chunk": (40, 257, 32),
    "a long contraction": (6, 33, 2100),
    "vocabulary of one": (4, 1, 8),
}
VARIANTS = {
    "plain": {},
    "bias, scale and softcap": {"bias": True, "logit_scale": 0.7, "softcap": 5.0},
}


def problem(shape, dtype, *, bias=False, weight_dtype=None):
    """Return hidden, weight, labels, bias of a head that is neither uniform nor certain; every fifth label is
    ignored."""
    M, V, K = SHAPES[shape]
    hidden = gaussian(M, K, dtype=dtype)
    weight = (3 * gaussian(V, K, seed=1) / K**0.5).to(weight_dtype or dtype)
    labels = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(2))
    labels[3::5] = -100
    return hidden, weight, labels, gaussian(V, seed=3) if bias else None


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradient_of_hidden(backend, dtype, shape, variant):
    options = dict(VARIANTS[variant])
    hidden, weight, labels, bias = problem(shape, dtype, bias=options.pop("bias", False), weight_dtype=torch.bfloat16)
    hidden.requires_grad_()
    with qk.use_backend(backend):
        losses = qk.linear_cross_entropy(hidden, weight, labels, bias, reduction="none", **options)
        losses.sum().backward()
        with torch.no_grad():
            evaluated = qk.linear_cross_entropy(hidden, weight, labels, bias, reduction="none", **options)
    # Triton's kernel writes the gradient of the logits in hidden's dtype, the operand of the second matmul.
    expected = formula(hidden, weight, labels, bias, **options, rounds_gradient=backend == "triton")
    assert losses.dtype == torch.float32
    assert_within(losses, expected.losses, "losses")
    assert_within(evaluated, expected.losses, "losses without a gradient")
    assert_within(hidden.grad, expected.rows, "grad_hidden")


@backends
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_head(backend, variant, monkeypatch):
    """Gradients equal torch's in float64; the head is longer than a chunk of its gradient."""
    monkeypatch.setattr("qlora_kernels.ops.linear_cross_entropy.VOCABULARY_CHUNK", 100)
    options = dict(VARIANTS[variant])
    hidden, weight, labels, _ = problem("blocks and chunks that are not full", torch.float32)
    bias = gaussian(len(weight), seed=3) if options.pop("bias", False) else None
    head = [t.requires_grad_() for t in (weight, bias) if t is not None]
    factors = gaussian(len(labels), seed=4)
    with qk.use_backend(backend):
        losses = qk.linear_cross_entropy(hidden, weight, labels, bias, reduction="none", **options)
        actual = torch.autograd.grad(losses, head, factors)
    z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    if options:
        cap = options["softcap"]
        z = cap * torch.tanh(z * options["logit_scale"] / cap)
    expected = torch.autograd.grad(F.cross_entropy(z, labels, reduction="none"), head, factors.double())
    for got, want in zip(actual, expected, strict=True):
        assert_same_function(got, want, products=4)


@backends
def test_reductions_equal_transformers(backend):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    hidden, weight, labels, _ = problem("one chunk", torch.float32)
    with qk.use_backend(backend):
        mean = qk.linear_cross_entropy(hidden, weight, labels)
        accumulated = qk.linear_cross_entropy(hidden, weight, labels, num_items_in_batch=torch.tensor(77))
        by_number = qk.linear_cross_entropy(hidden, weight, labels, num_items_in_batch=77)
    logits = hidden @ weight.T
    assert_same_function(mean, loss_utils.fixed_cross_entropy(logits, labels))
    assert_same_function(accumulated, loss_utils.fixed_cross_entropy(logits, labels, torch.tensor(77)))
    assert torch.equal(accumulated, by_number)


@backends
@dtypes
def test_ignored_tokens_have_no_influence(backend, dtype):
    """This holds for any hidden states; the ignored label may be inside the vocabulary."""
    hidden, weight, labels, _ = problem("one column beyond a chunk", dtype)
    labels[labels == -100] = 7
    hidden[labels == 7] = float("nan")
    hidden.requires_grad_()
    with qk.use_backend(backend):
        losses = qk.linear_cross_entropy(hidden, weight, labels, ignore_index=7, reduction="none")
        losses.sum().backward()
    assert (losses[labels == 7] == 0).all()
    assert (hidden.grad[labels == 7] == 0).all()
    assert hidden.grad.isfinite().all()
    kept = labels != 7
    expected = formula(hidden[kept], weight, labels[kept], rounds_gradient=backend == "triton")
    assert_within(losses[kept], expected.losses)
    assert_within(hidden.grad[kept], expected.rows)


@backends
def test_ignored_tokens_have_no_influence_on_the_gradient_of_the_head(backend):
    hidden, weight, labels, _ = problem("one column beyond a chunk", torch.float32)
    weight.requires_grad_()
    kept = labels != -100
    spoiled = hidden.masked_fill(~kept[:, None], float("nan"))
    with qk.use_backend(backend):
        qk.linear_cross_entropy(spoiled, weight, labels).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden[kept] @ weight.T, labels[kept]), weight)
    assert_same_function(weight.grad, expected)


@backends
def test_all_tokens_ignored(backend):
    hidden, weight, labels, _ = problem("one chunk", torch.float32)
    hidden.requires_grad_()
    labels.fill_(-100)
    with qk.use_backend(backend):
        assert qk.linear_cross_entropy(hidden, weight, labels).isnan()
        total = qk.linear_cross_entropy(hidden, weight, labels, reduction="sum")
        total.backward()
        empty = qk.linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="sum")
    assert total == 0
    assert empty == 0
    assert (hidden.grad == 0).all()


@backends
@dtypes
@pytest.mark.parametrize("growth", [1, 40], ids=["usual", "certain"])
def test_logits_increasing_along_vocabulary(backend, dtype, growth):
    """Each chunk raises the running maximum, and the sums are rescaled."""
    hidden, weight, labels, _ = problem("blocks and chunks that are not full", dtype)
    bias = growth * torch.arange(len(weight)) / 100
    hidden.requires_grad_()
    with qk.use_backend(backend):
        losses = qk.linear_cross_entropy(hidden, weight, labels, bias, reduction="none")
        losses.sum().backward()
    expected = formula(hidden, weight, labels, bias)
    assert_within(losses, expected.losses, "losses")
    assert_within(hidden.grad, expected.rows, "grad_hidden")


@backends
def test_minus_infinity_and_nan(backend):
    """A vocabulary padded by biases of -inf, also over a whole chunk, has the losses of the unpadded one."""
    hidden, weight, labels, _ = problem("blocks and chunks that are not full", torch.float32)
    labels = labels.where(labels < 0, 300 + labels % 100)
    hidden.requires_grad_()
    bias = torch.zeros(len(weight))
    bias[:300] = bias[420:] = -float("inf")
    spoiled = hidden.detach().clone()
    spoiled[2, 5] = float("nan")
    with qk.use_backend(backend):
        losses = qk.linear_cross_entropy(hidden, weight, labels, bias, reduction="none")
        losses.sum().backward()
        bad = qk.linear_cross_entropy(spoiled, weight, labels, reduction="none")
    expected = formula(hidden, weight[300:420], torch.where(labels < 0, labels, labels - 300))
    assert_within(losses, expected.losses)
    assert_within(hidden.grad, expected.rows)
    assert bad[2].isnan()
    assert bad[torch.arange(len(bad)) != 2].isfinite().all()


@backends
def test_leading_dimensions_and_strides(backend):
    hidden, weight, labels, _ = problem("one column beyond a chunk", torch.float32)
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0].view(4, 10, -1)
    transposed = weight.T.contiguous().T
    with qk.use_backend(backend):
        expected = qk.linear_cross_entropy(hidden, weight, labels, reduction="none")
        actual = qk.linear_cross_entropy(strided, transposed, labels.view(4, 10), reduction="none")
    assert torch.equal(actual, expected.view(4, 10))


@backends
def test_second_derivatives_and_forward_mode(backend):
    hidden, weight, labels, _ = problem("vocabulary of one", torch.float32)
    weight, labels = gaussian(9, 8, seed=5), torch.tensor([3, -100, 8, 0])
    hidden.requires_grad_(), weight.requires_grad_()

    def ours(hidden, weight):
        return qk.linear_cross_entropy(hidden, weight, labels, softcap=2.0)

    def dense(hidden, weight):
        return F.cross_entropy(2 * torch.tanh(hidden @ weight.T / 2), labels)

    def second(function):
        grads = torch.autograd.grad(function(hidden, weight), (hidden, weight), create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), (hidden, weight))

    def tangent(function):
        inputs = (hidden.detach(), weight.detach())
        return torch.func.jvp(function, inputs, inputs)

    with qk.use_backend(backend):
        for derivative in (second, tangent):
            for actual, expected in zip(derivative(ours), derivative(dense), strict=True):
                assert_same_function(actual, expected)


def test_autocast_uses_autocast_dtype():
    hidden, weight, labels, _ = problem("one chunk", torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = qk.linear_cross_entropy(hidden, weight, labels, reduction="none")
    losses.sum().backward()
    expected = formula(hidden.to(torch.bfloat16), weight, labels)
    assert_within(losses, expected.losses)
    assert_within(hidden.grad, expected.rows)


@backends
def test_opcheck(backend):
    hidden, weight, labels, bias = problem("vocabulary of one", torch.float32, bias=True)
    head = Head(weight.requires_grad_(), bias, -100, 1.0, 2.0)
    arguments = (hidden.requires_grad_(), labels, *head, True)
    with qk.use_backend(backend):
        torch.library.opcheck(torch.ops.qlora_kernels.linear_cross_entropy, arguments)


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
@pytest.mark.parametrize("shape", ["one token", "one column beyond a chunk", "a long contraction"])
def test_low_rank_columns(backend, dtype, shape, nf4, monkeypatch):
    """The op's own contract: columns of hidden beyond the weight's meet the factor low_rank."""
    monkeypatch.setattr("qlora_kernels.ops.output_head.DECODED_BYTES", 37 * 4 * 99)
    M, V, K = SHAPES[shape]
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


def test_refuses_bad_arguments():
    hidden, weight, labels, _ = problem("one chunk", torch.float32)
    call = qk.linear_cross_entropy
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels must lie in \[0, V=256\) .* got 256"):
        call(hidden, weight, labels.clone().fill_(256))
    with pytest.raises(ValueError, match=r"linear_cross_entropy: hidden.shape\[-1\] must equal K=64"):
        call(hidden[:, 1:], weight, labels)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels must have the leading dimensions of hidden"):
        call(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels must be int64"):
        call(hidden, weight, labels.int())
    with pytest.raises(TypeError, match=r"linear_cross_entropy: weight must be float32, bfloat16 or float16"):
        call(hidden, weight.double(), labels)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: softcap must be positive and finite, got 0.0"):
        call(hidden, weight, labels, softcap=0.0)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: logit_scale and softcap must be finite"):
        call(hidden, weight, labels, logit_scale=float("nan"))
    with pytest.raises(ValueError, match=r'linear_cross_entropy: reduction must be "mean", "sum" or "none"'):
        call(hidden, weight, labels, reduction="max")
    with pytest.raises(ValueError, match=r"linear_cross_entropy: bias must have 256 elements, got 3"):
        call(hidden, weight, labels, torch.zeros(3))
