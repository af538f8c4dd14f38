"""The formulas of the linear ops, with the roundings that a kernel may make, for python/numerics/tolerances.py.

`Arithmetic` describes these roundings. The formulas are those of ops/linear_nf4_lora.py, with W dequantized to x's
dtype and the LoRA factors in x's dtype:

    s = dropout(x) A^T,   y = x W^T + bias + scaling * s B^T
    ds = scaling * grad_y B,   grad_B = scaling * grad_y^T s,   grad_A = ds^T dropout(x),
    grad_x = grad_y W + dropout'(ds A)

`lora_forward` and `lora_backward` take the s that the kernel returned, which is compared separately first. The rounding
of s is therefore not part of the bounds on y and grad_B, and a kernel that computes with another s than it returns is
detected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kernels.rounding import cdiv

from .tolerances import Expected, assert_within, cpu_depth, exactly, product, unit_roundoff

PAIR_TABLE_ROUNDOFFS = 0.46
"""Largest relative error of a code of csrc/cuda/linear_nf4_pairs.cu, in unit roundoffs of bf16."""


@dataclass(frozen=True)
class Arithmetic:
    """The roundings of a computation.

    dtype: of x; s, ds and the results are rounded to it.
    composed: whether each torch operation rounds its result to dtype, as in backends/reference. Otherwise sums stay in
    fp32 until they are finished, and the dropout's scale and `scaling` multiply fp32 sums.
    cpu: the kernels of csrc/cpu, whose chain lengths are known, and which multiply B by `scaling` before they round it
    to dtype.
    weight_may_be_exact: whether a kernel may multiply by the unrounded code * absmax, as some do for few rows, although
    the tests pass the weight rounded to dtype.
    factor_may_be_scaled: whether `scaling` may multiply lora_B before it is rounded to dtype (ops/extended_k.py).
    pair_table: whether a kernel may multiply by the code rounded to bf16 and by absmax in fp32, as
    csrc/cuda/linear_nf4_pairs.cu does (docs/format.md).
    wide: the dtype of the exact computation (`tolerances.exactly`).
    """

    dtype: torch.dtype
    composed: bool = True
    cpu: bool = False
    weight_may_be_exact: bool = False
    factor_may_be_scaled: bool = False
    pair_table: bool = False
    wide: torch.dtype = torch.float64

    def input(self, tensor: Tensor | Expected) -> Expected:
        """Convert to the dtype of the computation, to which masters of LoRA factors are rounded first."""
        if isinstance(tensor, Expected):
            return tensor
        return exactly(tensor.detach().to(self.dtype), self.wide)

    def weight(self, w: Tensor) -> Expected:
        """Return W [N, K] dequantized to dtype, or in float64 for kernels that do not round it."""
        weight = exactly(w, self.wide)
        if not self.weight_may_be_exact:
            return weight
        roundoffs = 1 + PAIR_TABLE_ROUNDOFFS if self.pair_table else 1
        return Expected(weight.value, roundoffs * unit_roundoff(self.dtype) * weight.value.abs())

    def bias(self, tensor: Tensor) -> Expected:
        """Return a bias, which may also be rounded to dtype if operations are composed."""
        bias = exactly(tensor, self.wide)
        return Expected(bias.value, unit_roundoff(self.dtype) * bias.value.abs()) if self.composed else bias

    def product(self, a: Expected, b: Expected, beside: int = 0) -> Expected:
        """Return a @ b, rounded to dtype if each operation is.

        beside: number of terms of another product that is summed in the same accumulators.
        """
        depth = a.value.shape[-1] + beside
        if self.cpu and not (self.dtype == torch.bfloat16 and _bf16_pairs()):
            depth = cpu_depth(a.value.shape[-1]) + cdiv(beside, 512)  # dots.h adds whole pieces of the other product
        return self.partial(product(a, b, depth))

    def partial(self, result: Expected) -> Expected:
        """Return an intermediate result, rounded if each operation's is."""
        return result.to(self.dtype) if self.composed else result


def arithmetic_of(backend: str, dtype: torch.dtype) -> Arithmetic:
    """Return the arithmetic of a backend's linear ops for any kernel it chooses, but not of ops that it composes."""
    if backend == "cpu":
        return Arithmetic(dtype, composed=False, cpu=True)
    on_gpu, pair_table = backend in ("triton", "cuda"), backend == "cuda" and dtype == torch.bfloat16
    scaled = on_gpu and dtype != torch.float32
    return Arithmetic(dtype, weight_may_be_exact=on_gpu, factor_may_be_scaled=scaled, pair_table=pair_table)


def _bf16_pairs() -> bool:
    """Whether csrc/cpu may multiply bf16 by vdpbf16ps in one chain; AMX has shorter chains, but not for one token."""
    from qlora_kernels.backends import cpu

    return cpu.unavailable() is None and cpu.instruction_set().startswith(("avx512_bf16", "amx_bf16"))


class Dropout(NamedTuple):
    """The dropout of x in a reference computation.

    keep: bool [M, K], True for kept elements.   scale: the factor of kept elements.
    """

    keep: Tensor
    scale: float


def linear(x: Tensor, w: Tensor, bias: Tensor | None, arithmetic: Arithmetic) -> Expected:
    """Return y = x W^T + bias with its bound. w: dequantized, [N, K]."""
    y = arithmetic.product(arithmetic.input(x), arithmetic.weight(w).T)
    if bias is not None:
        y = y + arithmetic.bias(bias)
    return y.to(arithmetic.dtype)


def linear_grad_x(grad_y: Tensor, w: Tensor, arithmetic: Arithmetic) -> Expected:
    """Return grad_x = grad_y W with its bound."""
    return arithmetic.product(arithmetic.input(grad_y), arithmetic.weight(w)).to(arithmetic.dtype)


def lora_down(x: Tensor, lora_A: Tensor, dropout: Dropout | None, arithmetic: Arithmetic) -> Expected:
    """Return s = dropout(x) A^T with its bound."""
    if dropout is None:
        return arithmetic.product(arithmetic.input(x), arithmetic.input(lora_A).T).to(arithmetic.dtype)
    kept, scale = _dropped(x, dropout, arithmetic)
    return arithmetic.product(kept, arithmetic.input(lora_A).T).scaled(scale).to(arithmetic.dtype)


def lora_forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor | Expected,
    lora_B: Tensor,
    scaling: float,
    arithmetic: Arithmetic,
) -> Expected:
    """Return y = x W^T + bias + scaling * s B^T with its bound, for a computed or expected s [M, r]."""
    a, r, K = arithmetic, lora_B.shape[1], w.shape[1]
    y = a.product(a.input(x), a.weight(w).T, beside=r)
    if bias is not None:
        y = a.partial(y + a.bias(bias))
    return (y + a.partial(scaled_product(a.input(s), lora_B, scaling, a, beside=K))).to(a.dtype)


def scaled_product(s: Expected, lora_B: Tensor, scaling: float, arithmetic: Arithmetic, beside: int = 0) -> Expected:
    """Return scaling * s B^T with its bound."""
    if arithmetic.cpu:
        scaled = lora_B.detach().float() * scaling
        return arithmetic.product(s, arithmetic.input(scaled).T, beside)
    factor = arithmetic.input(lora_B)
    if arithmetic.factor_may_be_scaled and scaling:
        factor = Expected(factor.value, _error_of_scaled_factor(lora_B, factor.value, scaling, arithmetic.dtype))
    return arithmetic.product(s, factor.T, beside).scaled(scaling)


def _error_of_scaled_factor(lora_B: Tensor, rounded: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return how far scaling * B, rounded to dtype, may be from scaling times the rounded B, divided by scaling.

    Each is within one rounding of scaling * B.
    """
    exact, info = lora_B.detach().to(rounded.dtype), torch.finfo(dtype)
    rounding = unit_roundoff(dtype) * exact.abs() + info.tiny * info.eps / 2 / abs(scaling)
    return (exact - rounded).abs() + rounding


class Gradients(NamedTuple):
    """The gradients of lora_backward, those of lora_A and lora_B in fp32 or, if composed, rounded to x's dtype."""

    x: Expected
    lora_A: Expected
    lora_B: Expected


def lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor | Expected,
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout | None,
    arithmetic: Arithmetic,
) -> Gradients:
    """Return the three gradients with their bounds, for a saved or expected s [M, r]."""
    a, r, N = arithmetic, lora_B.shape[1], lora_B.shape[0]
    g, down = a.input(grad_y), a.input(lora_A)
    ds = a.product(g, a.input(lora_B)).scaled(scaling).to(a.dtype)
    grad_B = a.partial(a.product(g.T, a.input(s)).scaled(scaling))
    through = a.product(ds, down, beside=N)
    if dropout is None:
        grad_A = a.product(ds.T, a.input(x))
    else:
        kept, scale = _dropped(x, dropout, a)
        grad_A = a.product(ds.T, kept).scaled(scale)
        through = a.partial(through.masked(dropout.keep).scaled(dropout.scale))
    grad_x = (a.product(g, a.weight(w), beside=r) + through).to(a.dtype)
    return Gradients(grad_x, grad_A.to(torch.float32), grad_B.to(torch.float32))


def merged_weight(w: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, arithmetic: Arithmetic) -> Expected:
    """Return W' = W + scaling * B A with one rounding to dtype, for w [N, K] dequantized to fp32."""
    update = product(arithmetic.input(lora_B), arithmetic.input(lora_A)).scaled(scaling)
    return (exactly(w, arithmetic.wide) + update).to(arithmetic.dtype)


def assert_lora_merged(
    results: tuple[Tensor, ...],
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor],
    scaling: float,
    arithmetic: Arithmetic,
) -> None:
    """Compare every result of linear_nf4_lora_merged and its backward with its bound.

    results: y, and the gradients of x, lora_A and lora_B.   inputs: x, w in fp32, bias, lora_A, lora_B, y's gradient.
    """
    y, *gradients = results
    x, w, bias, lora_A, lora_B, grad_y = inputs
    a, merged = arithmetic, merged_weight(w, lora_A, lora_B, scaling, arithmetic)
    expected = a.product(a.input(x), merged.T)
    if bias is not None:
        expected = expected + a.bias(bias)
    assert_within(y, expected.to(a.dtype), "y")
    s = lora_down(x, lora_A, None, a)
    of_factors = lora_backward(grad_y, x, s, w, lora_A, lora_B, scaling, None, a)
    of_x = a.product(a.input(grad_y), merged).to(a.dtype)
    for which, actual, gradient in zip("xAB", gradients, (of_x, *of_factors[1:]), strict=True):
        assert_within(actual, gradient, f"grad of {which}")


def assert_lora(
    results: tuple[Tensor, ...],
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor],
    scaling: float,
    dropout: Dropout | None,
    arithmetic: Arithmetic,
    name: str = "",
) -> None:
    """Compare every result of the LoRA op and its backward with its bound.

    results: y, s, and the gradients of x, lora_A and lora_B.   inputs: x, w, bias, lora_A, lora_B and y's gradient.
    """
    y, s, *gradients = results
    x, w, bias, lora_A, lora_B, grad_y = inputs
    assert_within(s, lora_down(x, lora_A, dropout, arithmetic), f"s{name}")
    assert_within(y, lora_forward(x, w, bias, s, lora_B, scaling, arithmetic), f"y{name}")
    expected = lora_backward(grad_y, x, s, w, lora_A, lora_B, scaling, dropout, arithmetic)
    for which, actual, gradient in zip(expected._fields, gradients, expected, strict=True):
        assert_within(actual, gradient, f"grad of {which}{name}")


def assert_multi_lora(
    results: tuple[Tensor, ...],
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor],
    scalings: Tensor,
    adapter: Tensor,
    dropout: Dropout | None,
    arithmetic: Arithmetic,
) -> None:
    """Compare results as assert_lora does, for rows with different adapters, whose rows each form a LoRA linear."""
    y, s, grad_x, grad_A, grad_B = results
    x, w, bias, lora_A, lora_B, grad_y = inputs
    for e in range(-1, lora_A.shape[0]):
        rows = (adapter == e).nonzero()[:, 0]
        if e < 0:
            assert not s[rows].any(), "s of rows without an adapter is zero"
            assert_within(y[rows], linear(x[rows], w, bias, arithmetic), "y without an adapter")
            assert_within(grad_x[rows], linear_grad_x(grad_y[rows], w, arithmetic), "grad_x without an adapter")
            continue
        kept = None if dropout is None else Dropout(dropout.keep[rows], dropout.scale)
        of_rows = (y[rows], s[rows], grad_x[rows], grad_A[e], grad_B[e])
        operands = (x[rows], w, bias, lora_A[e], lora_B[e], grad_y[rows])
        assert_lora(of_rows, operands, float(scalings[e]), kept, arithmetic, f" under adapter {e}")


def _dropped(x: Tensor, dropout: Dropout, arithmetic: Arithmetic) -> tuple[Expected, float]:
    """Return (dropout(x), 1.0) if the scale multiplies x, otherwise (x with dropped elements zeroed, the scale)."""
    kept = arithmetic.input(x).masked(dropout.keep)
    if arithmetic.composed:
        return kept.scaled(dropout.scale).to(arithmetic.dtype), 1.0
    return kept, dropout.scale
