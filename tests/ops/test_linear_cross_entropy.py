"""linear_cross_entropy against float64 within the bounds of an error analysis, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qlora_kernels as qk
from qlora_kernels.ops.output_head import Head
from tests.support.cross_entropy_formula import linear_cross_entropy as formula
from tests.support.problems import gaussian
from tests.support.tolerances import assert_repeats, assert_same_function, assert_within

from .cross_entropy_problems import SHAPES, backends, dtypes, problem

VARIANTS = {
    "plain": {},
    "bias, scale and softcap": {"bias": True, "logit_scale": 0.7, "softcap": 5.0},
}


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


def test_a_head_between_two_dwords():
    """The CPU kernel reads pairs of bf16 in place only if they are aligned; a part of a flat parameter may not be."""
    hidden, weight, labels, _ = problem("one chunk", torch.bfloat16)
    shifted = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight)
    assert shifted.data_ptr() % 4 == 2
    found = []
    for head in (weight, shifted):
        rows = hidden.clone().requires_grad_()
        with qk.use_backend("cpu"):
            losses = qk.linear_cross_entropy(rows, head, labels, reduction="none")
        losses.sum().backward()
        found.append((losses, rows.grad))
    assert all(map(torch.equal, *found))


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
@pytest.mark.parametrize(
    ("shape", "growth"),
    [
        pytest.param("blocks and chunks that are not full", 1, id="usual"),
        pytest.param("blocks and chunks that are not full", 40, id="certain"),
        pytest.param("more chunks than parts", 4, id="rescaled"),
        pytest.param("more chunks than parts", 40, id="replaced"),
    ],
)
def test_logits_increasing_along_vocabulary(backend, dtype, shape, growth):
    """Each chunk raises the running maximum, and the sums are rescaled."""
    hidden, weight, labels, _ = problem(shape, dtype)
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
    assert_repeats(actual, expected.view(4, 10), backend, terms=hidden.shape[-1])


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
