"""Higher and forward-mode derivatives equal those of torch's ops, or raise; they are never zero silently."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import qlora_kernels as qk
from qlora_kernels.ops.operands import weight_of
from qlora_kernels.ops.philox import dropped
from tests.support.problems import gaussian
from tests.support.tolerances import unit_roundoff

M, N, K, R = 5, 16, 32, 4
DROPOUT_P = 0.3
SEED = torch.tensor([7])
ADAPTER = torch.tensor([0, 1, -1, 1, 0])
SCALINGS = torch.tensor([2.0, 3.0])
RELATIVE = 6 * K**0.5 * unit_roundoff(torch.float32)
"""Relative to a tensor's norm: up to six successive products of at most K terms per sum. In a norm over many elements,
the roundings of a sum add as independent random numbers do, as the square root of their number."""


@pytest.fixture(scope="module")
def weight():
    return qk.quantize_nf4(gaussian(N, K, seed=1) / K**0.5)


class Case:
    """An op and the same function composed of dense torch ops, both of `arguments`."""

    def __init__(self, op, dense, **arguments):
        self.op, self.dense, self.arguments = op, dense, tuple(arguments.values())
        self.directions = tuple(gaussian(*a.shape, seed=20 + i) for i, a in enumerate(self.arguments))


def plain(packed, state, w):
    return Case(
        lambda x, bias: qk.linear_nf4(x, packed, state, bias),
        lambda x, bias: x @ w.T + bias,
        x=gaussian(M, K),
        bias=gaussian(N, seed=2),
    )


def factors():
    return {"A": gaussian(R, K, seed=3) / K**0.5, "B": gaussian(N, R, seed=4)}


def lora(packed, state, w):
    def op(x, bias, A, B):
        return qk.linear_nf4_lora(x, packed, state, A, B, bias, scaling=2.0, dropout_p=DROPOUT_P, seed=SEED)

    def dense(x, bias, A, B):
        return x @ w.T + bias + 2 * (dropped(x, SEED, DROPOUT_P) @ A.T) @ B.T

    return Case(op, dense, x=gaussian(M, K), bias=gaussian(N, seed=2), **factors())


def multi_lora(packed, state, w):
    def op(x, A, B):
        return qk.linear_nf4_multi_lora(x, packed, state, A, B, SCALINGS, ADAPTER, dropout_p=DROPOUT_P, seed=SEED)

    def dense(x, A, B):
        rows = []
        for row, low, e in zip(x, dropped(x, SEED, DROPOUT_P), ADAPTER.tolist(), strict=True):
            rows.append(w @ row + (0 if e < 0 else SCALINGS[e] * (B[e] @ (A[e] @ low))))
        return torch.stack(rows)

    A, B = (torch.stack([factor, 0.5 - factor]) for factor in factors().values())
    return Case(op, dense, x=gaussian(M, K), A=A, B=B)


def group(packed, state, w):
    def op(x, A1, B1, A2, B2):
        ys = qk.linear_nf4_lora_group(
            x, [packed] * 2, [state] * 2, [A1, A2], [B1, B2], scalings=[2.0, 3.0], dropout_p=DROPOUT_P, seed=SEED
        )
        return torch.cat(ys, dim=-1)

    def dense(x, A1, B1, A2, B2):
        low = dropped(x, SEED, DROPOUT_P)
        return torch.cat([x @ w.T + 2 * (low @ A1.T) @ B1.T, x @ w.T + 3 * (low @ A2.T) @ B2.T], dim=-1)

    A, B = factors().values()
    return Case(op, dense, x=gaussian(M, K), A1=A, B1=B, A2=0.5 - A, B2=0.5 - B)


@pytest.fixture(params=[plain, lora, multi_lora, group], ids=lambda make: make.__name__)
def case(request, weight):
    packed, state = weight
    return request.param(packed, state, qk.dequantize_nf4(packed, state))


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= RELATIVE * b.norm()


def cubed(function):
    return lambda *arguments: function(*arguments).pow(3).sum()


def first(case, function):
    return torch.func.grad(cubed(function), argnums=tuple(range(len(case.arguments))))(*case.arguments)


def second(case, function):
    """Return gradients of a gradient, by torch.autograd."""
    leaves = [argument.clone().requires_grad_() for argument in case.arguments]
    grads = torch.autograd.grad(cubed(function)(*leaves), leaves, create_graph=True)
    along = sum((grad * v).sum() for grad, v in zip(grads, case.directions, strict=True))
    return torch.autograd.grad(along, leaves)


def tangent(case, function):
    return torch.func.jvp(function, case.arguments, case.directions)


def forward_over_reverse(case, function):
    last = len(case.arguments) - 1
    return [torch.func.hessian(cubed(function), argnums=last)(*case.arguments)]


@pytest.mark.parametrize("derivative", [first, second, tangent, forward_over_reverse], ids=lambda d: d.__name__)
def test_derivatives_equal_dense_torch(case, derivative):
    assert_close(derivative(case, case.op), derivative(case, case.dense))


def test_dual_numbers_without_functorch(case):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, v) for a, v in zip(case.arguments, case.directions, strict=True)]
        actual = forward_ad.unpack_dual(case.op(*duals)).tangent
    assert_close([actual], [tangent(case, case.dense)[1]])


def test_second_derivatives_through_a_checkpoint(case):
    recomputed = second(case, lambda *arguments: checkpoint(case.op, *arguments, use_reentrant=False))
    assert_close(recomputed, second(case, case.dense))


def test_vmap_of_a_gradient(weight):
    packed, state = weight
    w, x = qk.dequantize_nf4(packed, state), gaussian(M, K)
    actual = torch.func.vmap(torch.func.grad(lambda row: qk.linear_nf4(row, packed, state).pow(3).sum()))(x)
    assert_close([actual], [3 * (x @ w.T).square() @ w])


def test_third_derivatives_run_on_the_kernels(weight):
    packed, state = weight
    w, v = qk.dequantize_nf4(packed, state), gaussian(M, K, seed=9)

    def third(function):
        x = gaussian(M, K).requires_grad_()
        (grad,) = torch.autograd.grad(function(x).pow(4).sum(), x, create_graph=True)
        (grad,) = torch.autograd.grad((grad * v).sum(), x, create_graph=True)
        return torch.autograd.grad((grad * v).sum(), x)

    assert_close(third(lambda x: qk.linear_nf4(x, packed, state)), third(lambda x: x @ w.T))


def test_transforms_under_compile(weight):
    packed, state = weight
    x, v = gaussian(M, K), gaussian(M, K, seed=9)

    def along(x, v):
        return torch.func.jvp(lambda x: qk.linear_nf4(x, packed, state).sin(), (x,), (v,))[1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(along, backend="aot_eager")(x, v)
    assert_close([compiled], [along(x, v)])


def test_layer_supports_forward_mode():
    layer, x, v = qk.LinearNF4.from_linear(nn.Linear(K, N)), gaussian(M, K), gaussian(M, K, seed=9)
    _, out = torch.func.jvp(layer, (x,), (v,))
    assert_close([out], [v @ layer.dequantize().T])


@pytest.mark.parametrize("mode", ["gradient", "tangent"])
def test_constants_refuse_derivatives(mode, weight):
    packed, state = weight
    fields = weight_of("test", packed, state)
    x, grad_y, scale = gaussian(M, K), gaussian(M, N), state.absmax_scale
    ops = torch.ops.qlora_kernels
    calls = [
        lambda scale: ops.linear_nf4(x, *fields._replace(absmax_scale=scale), None),
        lambda scale: ops.linear_nf4_grad_x(grad_y, *fields._replace(absmax_scale=scale)),
        lambda scale: ops.dequantize_nf4(*fields._replace(absmax_scale=scale), dtype=torch.float32),
        lambda scale: ops.quantize_absmax(scale),
        lambda scale: ops.quantize_nf4(scale, blocksize=64),
    ]
    for call in calls:
        asked = {
            "gradient": lambda call=call: call(scale.clone().requires_grad_()),
            "tangent": lambda call=call: torch.func.jvp(call, (scale,), (scale,)),
        }
        with pytest.raises(NotImplementedError, match="a gradient"):
            asked[mode]()


def test_scalings_of_adapters_refuse_a_gradient(weight):
    A, B = (torch.stack([factor, factor]) for factor in factors().values())
    with pytest.raises(NotImplementedError, match="linear_nf4_multi_lora: scalings must not require a gradient"):
        qk.linear_nf4_multi_lora(
            gaussian(M, K), *weight, A.requires_grad_(), B, SCALINGS.clone().requires_grad_(), ADAPTER
        )


def test_group_with_only_lora_B_trained(weight):
    packed, state = weight
    A, B = factors().values()
    B.requires_grad_()
    x = gaussian(M, K)
    (y,) = qk.linear_nf4_lora_group(x, [packed], [state], [A], [B], scalings=[2.0])
    y.sum().backward()
    assert_close([B.grad], [2 * torch.ones(N, M) @ (x @ A.T)])
    bias = torch.zeros(N, requires_grad=True)
    with pytest.raises(NotImplementedError, match="biases must not require a gradient"):
        qk.linear_nf4_lora_group(x, [packed], [state], [A], [B], [bias], scalings=[2.0])


def test_outputs_may_be_written_to(weight):
    """Outputs may be modified in place, as those of nn.Linear: models add residuals, and ReLU has an option for it."""
    packed, state = weight
    A, B = (factor.requires_grad_() for factor in factors().values())
    x = gaussian(M, K).view(1, M, K).requires_grad_()
    w = qk.dequantize_nf4(packed, state)
    update = 2 * x @ A.T @ B.T
    outputs = {
        "linear": (qk.linear_nf4(x, packed, state), x @ w.T),
        "lora": (qk.linear_nf4_lora(x, packed, state, A, B, scaling=2.0), x @ w.T + update),
        "multi": (
            qk.linear_nf4_multi_lora(
                x, packed, state, A[None], B[None], torch.full((1,), 2.0), torch.zeros(M, dtype=torch.int64)
            ),
            x @ w.T + update,
        ),
        "group": (
            qk.linear_nf4_lora_group(x, [packed] * 2, [state] * 2, [A, A], [B, B], scalings=[2.0, 2.0])[1],
            x @ w.T + update,
        ),
    }
    for name, (y, expected) in outputs.items():
        leaves = (x,) if name == "linear" else (x, A, B)
        actual = torch.autograd.grad(y.mul_(3).relu_().square().sum(), leaves, retain_graph=True)
        assert_close(actual, torch.autograd.grad((3 * expected).relu().square().sum(), leaves, retain_graph=True))
