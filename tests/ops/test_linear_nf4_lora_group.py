"""Class 2 (matmul): linears on one x as one op, against float64 and against linear_nf4_lora one by one."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import Dropout, arithmetic_of, lora_backward, lora_down, lora_forward
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_repeats, assert_same_function, assert_within, model_error

backends = pytest.mark.parametrize("backend", usable_backends("linear_nf4_lora_group"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

SHAPES = [
    pytest.param(3, 64, (40, 17), (4, 3), id="M3-K64"),
    pytest.param(1, 70, (33, 40, 37), (1, 2, 16), id="M1-K70"),
    pytest.param(67, 320, (96, 32, 32), (16, 16, 16), id="M67-K320"),
    pytest.param(9, 128, (1024, 33), (2, 5), id="M9-N1024"),  # rows of 2 KiB, which the CPU copies
]
SCALINGS = (2.0, 0.5, 1.5)


def problem(M, K, widths, ranks, dtype):
    weights = [qk.quantize_nf4(gaussian(N, K, seed=i) / K**0.5) for i, N in enumerate(widths)]
    factors_A = [(gaussian(r, K, seed=10 + i) / K**0.5).to(dtype).float() for i, r in enumerate(ranks)]
    pairs = zip(widths, ranks, strict=True)
    factors_B = [gaussian(N, r, seed=20 + i).to(dtype).float() for i, (N, r) in enumerate(pairs)]
    biases = [None if i == 1 else gaussian(N, seed=30 + i, dtype=dtype) for i, N in enumerate(widths)]
    leaves = [gaussian(M, K, dtype=dtype, seed=40), *factors_A, *factors_B]
    return weights, biases, [leaf.requires_grad_() for leaf in leaves]


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
    weights, biases, leaves = problem(M, K, widths, ranks, dtype)
    seed = torch.tensor([0x1234567890ABCDEF])
    grads = [gaussian(M, N, dtype=dtype, seed=50 + i) for i, N in enumerate(widths)]
    fields = [list(field) for field in zip(*(weight_of("test", *pair) for pair in weights), strict=True)]
    x, factors_A, factors_B = leaves[0], leaves[1 : 1 + len(widths)], leaves[1 + len(widths) :]
    lora = (torch.cat(factors_A), factors_B, seed if p else None, list(SCALINGS[: len(widths)]), p)
    with qk.use_backend(backend):
        ys, s = torch.ops.qlora_kernels.linear_nf4_lora_group(x, biases, *fields, *lora)
        torch.autograd.backward(ys, grads)
    assert all(y.dtype == dtype for y in ys)
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)

    dropout = Dropout(dropout_keep(seed, M, K, p), keep_scale(p)) if p else None
    arithmetic, parts, grad_x = arithmetic_of(backend, dtype), s.split(list(ranks), dim=1), None
    for i, y in enumerate(ys):
        w, lora_A, lora_B = qk.dequantize_nf4(*weights[i], dtype), factors_A[i], factors_B[i]
        assert_within(parts[i], lora_down(x, lora_A, dropout, arithmetic), f"s_{i}")
        assert_within(y, lora_forward(x, w, biases[i], parts[i], lora_B, SCALINGS[i], arithmetic), f"y_{i}")
        operands = (grads[i], x, parts[i], w, lora_A, lora_B, SCALINGS[i], dropout, arithmetic)
        expected = lora_backward(*operands)
        assert_within(lora_A.grad, expected.lora_A, f"grad of lora_A_{i}")
        assert_within(lora_B.grad, expected.lora_B, f"grad of lora_B_{i}")
        grad_x = expected.x if grad_x is None else (grad_x + expected.x).to(dtype)
    assert_within(x.grad, grad_x, "grad of x")


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
            ([gaussian(3, 8), gaussian(3, 5)], x.detach(), gaussian(3, 6), *fields, *detached, True),
            **bounds,
        )
