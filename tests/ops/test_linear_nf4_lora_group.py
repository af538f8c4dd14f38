"""Class 2 (matmul): linears on one x as one op, against float64 and against linear_nf4_lora one by one."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import weight_of
from tests.support.lora_group_checks import SCALINGS, SHAPES, check_forward_and_gradients, problem
from tests.support.op_recorder import OpResults
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_repeats, assert_same_function, model_error

backends = pytest.mark.parametrize("backend", usable_backends("linear_nf4_lora_group"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def run_group(weights, biases, leaves, dropout_p, seed):
    x, A, B = leaves[0], leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
    packed, states = zip(*weights, strict=True)
    scalings = SCALINGS[: len(weights)]
    return qk.linear_nf4_lora_group(x, packed, states, A, B, biases, scalings=scalings, dropout_p=dropout_p, seed=seed)


@backends
@dtypes
@pytest.mark.parametrize(("M", "K", "widths", "ranks"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_gradients(backend, dtype, M, K, widths, ranks, p):
    check_forward_and_gradients(backend, dtype, M, K, widths, ranks, p)


@backends
def test_group_equals_linear_nf4_lora_with_same_seed(backend):
    weights, biases, leaves = problem(5, 64, (40, 17), (4, 3), torch.float32)
    seed = torch.tensor([77])
    with qk.use_backend(backend):
        ys = run_group(weights, biases, leaves, 0.4, seed)
        for i, (packed, state) in enumerate(weights):
            alone = qk.linear_nf4_lora(
                leaves[0],
                packed,
                state,
                leaves[1 + i],
                leaves[3 + i],
                biases[i],
                scaling=SCALINGS[i],
                dropout_p=0.4,
                seed=seed,
            )
            assert_same_function(ys[i], alone)  # another mask would give a very different result


@backends
@pytest.mark.parametrize("frozen", [(1, 2), (3, 4), (0, 1, 2), (1,), (4,)], ids=str)
def test_gradients_of_frozen_factors_are_not_computed(backend, frozen):
    """Leaves: x, two A and two B. The op leaves out what no linear of the group needs; others keep their bits.

    Without grads of B, Triton computes ds = grad_y B by another kernel, whose order of summation is another one.
    """
    weights, biases, leaves = problem(5, 64, (40, 17), (4, 3), torch.float32)
    kept = [leaf for place, leaf in enumerate(leaves) if place not in frozen]

    def loss():
        return sum(y.sum() for y in run_group(weights, biases, leaves, 0.0, None))

    with qk.use_backend(backend), OpResults("linear_nf4_lora_group_backward") as backward:
        every = torch.autograd.grad(loss(), leaves)
        for place in frozen:
            leaves[place].requires_grad_(False)
        found = iter(torch.autograd.grad(loss(), kept))
    (of_x, of_A, of_B) = backward.results[-1]
    assert (of_x.numel() > 0) == (0 not in frozen)
    assert (of_A.numel() > 0) == (not {1, 2} <= set(frozen))
    assert all((grad.numel() > 0) == (not {3, 4} <= set(frozen)) for grad in of_B)
    for grad in (grad for place, grad in enumerate(every) if place not in frozen):
        if backend == "triton" and {3, 4} <= set(frozen):
            assert_same_function(next(found), grad, products=3, terms=57)
        else:
            assert torch.equal(next(found), grad)


@backends
def test_unused_output_of_group(backend):
    """Its gradient is zero, and the other gradients do not change."""
    weights, biases, leaves = problem(5, 64, (40, 17), (4, 3), torch.float32)
    with qk.use_backend(backend):
        run_group(weights, biases, leaves, 0.0, None)[0].sum().backward()
    assert leaves[4].grad is None or not leaves[4].grad.any()
    assert leaves[3].grad.any()
    assert leaves[0].grad.any()


@backends
def test_leading_dimensions_and_no_rows(backend):
    weights, biases, leaves = problem(6, 64, (40, 17), (4, 3), torch.float32)
    with qk.use_backend(backend):
        flat = run_group(weights, biases, leaves, 0.0, None)
        shaped = run_group(weights, biases, [leaves[0].view(2, 3, 64), *leaves[1:]], 0.0, None)
        empty = run_group(weights, biases, [leaves[0][:0], *leaves[1:]], 0.0, None)
    for a, b, c in zip(flat, shaped, empty, strict=True):
        assert_repeats(a.view(b.shape), b, backend, products=3, terms=64)
        assert c.shape == (0, a.shape[1])


@backends
def test_grad_x_only_where_needed(backend):
    weights, biases, leaves = problem(5, 64, (40, 17), (4, 3), torch.float32)
    x = leaves[0].detach()
    with qk.use_backend(backend):
        sum(y.sum() for y in run_group(weights, biases, [x, *leaves[1:]], 0.2, torch.tensor([3]))).backward()
    assert x.grad is None
    assert leaves[1].grad is not None


def test_refuses_bad_arguments():
    weights, biases, leaves = problem(5, 64, (40, 17), (4, 3), torch.float32)
    with pytest.raises(ValueError, match=r"linear_nf4_lora_group: x.shape\[-1\] must equal K=64, got shape \(5, 63\)"):
        run_group(weights, biases, [leaves[0][:, :63], *leaves[1:]], 0.0, None)
    with pytest.raises(ValueError, match=r"every linear must have each of its arguments, got 2 weights, 1 biases"):
        run_group(weights, biases[:1], leaves, 0.0, None)
    with pytest.raises(ValueError, match=r"lora_A must have as many rows as lora_B have columns, \[4, 3\], got 6"):
        run_group(weights, biases, [*leaves[:2], leaves[2][:2], *leaves[3:]], 0.0, None)


@backends
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(backend, p, double_quant):
    pairs = [qk.quantize_nf4(gaussian(N, 96), double_quant=double_quant) for N in (8, 5)]
    fields = [list(field) for field in zip(*(weight_of("opcheck", *pair) for pair in pairs), strict=True)]
    x, A = gaussian(3, 96).requires_grad_(), gaussian(6, 96).requires_grad_()
    B = [gaussian(8, 4).requires_grad_(), gaussian(5, 2).requires_grad_()]
    factors = (A, B, torch.tensor([3]) if p else None, [0.5, 2.0], p)
    # Eager and traced calls of the reference may add in another order; results have a magnitude of about 200.
    error = model_error(products=3, terms=96) if backend == "reference" else None
    bounds = {"rtol": error, "atol": None if error is None else 200 * error}
    with qk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4_lora_group, (x, [gaussian(8), None], *fields, *factors), **bounds
        )
        detached = (A.detach(), [b.detach() for b in B], *factors[2:])
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4_lora_group_backward,
            ([gaussian(3, 8), gaussian(3, 5)], x.detach(), gaussian(3, 6), *fields, *detached, True, False, True),
            **bounds,
        )
