"""The numerical bounds of the tests: how far a correct result may differ from the exact one, by an error analysis.

A bound must hold on every CPU, so it must not be measured against another library's result: the order of summation of
that library's matmul, and therefore its rounding error, depends on the CPU, the number of threads and even the
alignment of a tensor. Here a bound follows from the tested computation itself: the number of terms in its sums, their
precision and magnitude, and the intermediate results that are rounded to a narrower type.

**Use in a test.** The test writes the op's formula once, over `Expected` values: a value in float64 with an
element-wise bound on the error of any correct computation of it. Arithmetic on them propagates both (a running error
analysis). `assert_within` then compares a kernel's result element by element:

    s = product(exactly(x), exactly(A.to(dtype)).T).to(dtype)          # fp32 sums, rounded once to x's dtype
    y = (product(exactly(x), exactly(w).T) + product(s, exactly(B).T).scaled(scaling) + exactly(bias)).to(dtype)
    assert_within(actual, y, "y")

The inputs must be the same tensors that the kernel read; `exactly` widens them without error. Every rounding that the
computation may make has to be written down: a result that was rounded more often exceeds the bound.

**The analysis.** u is the unit roundoff of a type, half of its eps: fl(a op b) = (a op b)(1 + d), |d| <= u. Source:
N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, sections 2.2 (the model), 3.1 (inner
products), 3.3 (running error analysis), 3.5 (matrix products) and 4.2 (summation).

- *A matrix product* A B of n terms per sum: for any order of the additions, fused or not, each term is rounded at most
  n times, so |error| <= gamma_n |A| |B| element by element, gamma_n = n u / (1 - n u). If each term is known to be
  rounded fewer times, because the sum is split into chains, that number replaces n (Higham 4.2): `cpu_depth` for the
  kernels of csrc/cpu.
- *Many roundings* do not all have the same sign. If they are independent and have mean zero, gamma_n may be
  replaced by exp(t sqrt(n) u) - 1, about t sqrt(n) u, and the bound on an element of N terms fails with a probability
  of at most 2 N exp(-t^2 / 2) (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
  Comput. 41, 2019, theorem 3.1). `gamma` uses t = 8, a probability of 2.6e-14 N, wherever that is the smaller of the
  two, that is from n = 64 on. Tensor cores truncate instead of rounding to nearest, once for each 16 terms or more: at
  most 2u for 16 terms and so below 8 sqrt(n) u up to n = 4096. In practice errors stay ten times below these bounds,
  because |A| |B| is the size of the sum as if no two terms had opposite signs.
- *A rounding* to a type adds u (|value| + error), and half of the smallest subnormal number.
- *Errors of operands* pass through a product as error_A |B| + (|A| + error_A) error_B.

Matrix products of bf16 and fp16 operands are summed in fp32, in our kernels as in torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.rounding import cdiv

if not __debug__:
    raise RuntimeError("tolerances: assert statements must be executed, got python -O; unset PYTHONOPTIMIZE")

CONFIDENCE = 8.0
"""t above: the number of standard deviations of accumulated rounding errors in a bound."""


@dataclass(frozen=True)
class Expected:
    """An exact result, and an element-wise bound on the error of a correct computation of it.

    value: float64, or float32 if that is exact enough (`exactly`).   error: the same shape and dtype, >= 0.
    """

    value: Tensor
    error: Tensor

    @property
    def T(self) -> Expected:
        """Return the transpose of a matrix and of its bound."""
        return Expected(self.value.T, self.error.T)

    @property
    def magnitude(self) -> Tensor:
        """Return the largest absolute value that a correct computation may give."""
        return self.value.abs() + self.error

    def __getitem__(self, index: Any) -> Expected:
        return Expected(self.value[index], self.error[index])

    def __add__(self, other: Expected) -> Expected:
        """Add in fp32, counting the magnitudes of both terms, so that sums of three have a valid bound in any order."""
        rounding = unit_roundoff(torch.float32) * (self.magnitude + other.magnitude)
        return Expected(self.value + other.value, self.error + other.error + rounding)

    def scaled(self, factor: float | Tensor) -> Expected:
        """Multiply in fp32 by `factor`, which is itself rounded to fp32. Powers of two multiply exactly."""
        factors = torch.as_tensor(factor, dtype=self.value.dtype, device=self.value.device)
        mantissa = torch.frexp(factors).mantissa.abs()
        roundings = torch.where((mantissa == 0.5) | (mantissa == 0), 0.0, 2 * unit_roundoff(torch.float32))
        size = factors.abs() * self.magnitude
        return Expected(factors * self.value, factors.abs() * self.error + roundings * size)

    def masked(self, keep: Tensor) -> Expected:
        """Set the elements where `keep` is False to zero."""
        return Expected(self.value * keep, self.error * keep)

    def to(self, dtype: torch.dtype) -> Expected:
        """Round to `dtype`; a value without error is rounded exactly and stays without error."""
        if not self.error.any():
            return Expected(self.value.to(dtype).to(self.value.dtype), self.error)
        info = torch.finfo(dtype)
        return Expected(self.value, self.error + unit_roundoff(dtype) * self.magnitude + info.tiny * info.eps / 2)


def exactly(tensor: Tensor, wide: torch.dtype = torch.float64) -> Expected:
    """Return the input of a computation, which has no error.

    wide: the dtype of the exact computation. float32 is for large products of 16-bit tensors, whose fp32 sums then
    count twice, once for the tested computation and once for the exact one.
    """
    value = tensor.detach().to(wide)
    return Expected(value, torch.zeros_like(value))


def product(a: Expected, b: Expected, depth: int | None = None) -> Expected:
    """Return a [M, K] @ b [K, N] with fp32 accumulators.

    depth: maximum number of roundings of one term; the default K holds for any order of summation.
    """
    length = a.value.shape[-1]
    size = a.magnitude @ b.magnitude
    roundings = gamma(length if depth is None else depth, torch.float32) + gamma(length, a.value.dtype)
    error = roundings * size
    if a.error.any() or b.error.any():
        error = error + a.error @ b.magnitude + a.value.abs() @ b.error
    return Expected(a.value @ b.value, error)


def total(a: Expected) -> Expected:
    """Return the sum of a's rows, in any order, with fp32 accumulators."""
    ones = exactly(torch.ones(1, a.value.shape[0], device=a.value.device), a.value.dtype)
    return product(ones, a)[0]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """Return a bound on the relative error of n successive roundings; see the docstring of this module."""
    u = unit_roundoff(dtype)
    return min(n * u / (1 - n * u), float(torch.tensor(CONFIDENCE * n**0.5 * u, dtype=torch.float64).expm1()))


def cpu_depth(length: int) -> int:
    """Return the maximum number of roundings of one term of an fp32 sum of `length` terms in csrc/cpu.

    gemm.h adds chains of kChain = 32 terms, one after the other. dots.h gives each lane (four in a vector of the
    portable code, more elsewhere) its part of a piece of at most 4096 terms, adds the lanes in two steps, and then the
    pieces, of at least 512 terms. bf16 operands on AVX512-BF16 are summed in one chain instead.
    """
    panels = 32 + cdiv(length, 32)
    dots = cdiv(min(length, 4096), 4) + 2 + cdiv(length, 512)
    return min(length, max(panels, dots))


def assert_within(actual: Tensor, expected: Expected, name: str = "result") -> None:
    """Assert |actual - expected.value| <= expected.error in every element; the message describes the worst element.

    Raises AssertionError also for another shape and for elements that are not finite.
    """
    assert actual.shape == expected.value.shape, f"{name}: shape {tuple(actual.shape)}, not {expected.value.shape}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual.detach().to(expected.value.dtype) - expected.value).abs()
    wrong = error > expected.error
    if not wrong.any():
        return
    worst = int((error / expected.error).nan_to_num(posinf=torch.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    raise AssertionError(
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are out of bounds; the worst is {index}: "
        f"{actual[index].item():.9g}, exactly {expected.value[index].item():.9g}; "
        f"error {error[index].item():.3e} exceeds {expected.error[index].item():.3e}"
    )


def model_error(products: int = 10, dtype: torch.dtype = torch.float32, terms: int = 32) -> float:
    """Return how much two correct computations of one model's output may differ, relative to the largest output.

    If a whole model is computed twice (merged and unmerged, or by this and another library), the order of every sum may
    differ: it depends on shapes, strides, threads and, in MKL, on the alignment of tensors. Let the output depend on
    `products` successive matrix products of `terms` terms per sum. Each adds an error of gamma(terms) |A| |B|, which is
    sqrt(terms) times |A B| if the signs of the terms are random, and normalisation prevents growth between products.
    The tests' tiny transformers have 32 hidden units and two layers of four successive products, then a head: 1.1e-4 in
    fp32. A 16-bit model also rounds each product's result, 2e-2 in bf16; most models are compared in fp32. An adapter
    that is left out, applied twice or read from another layer changes outputs by 1e-2 or more.
    """
    rounding = 0.0 if dtype == torch.float32 else unit_roundoff(dtype)
    error: float = products * (terms**0.5 * gamma(terms, torch.float32) + rounding)
    return error


def assert_same_function(
    actual: Tensor,
    expected: Tensor,
    name: str = "result",
    *,
    products: int = 10,
    terms: int = 32,
    scale: float | None = None,
    arithmetic: torch.dtype | None = None,
) -> None:
    """Assert that two computations of one model's output agree within `model_error`.

    products: number of successive products, for less than a whole model.
    terms: length of their sums.
    scale: the magnitude that the error is relative to; by default the largest element of `expected`.
    arithmetic: the narrowest dtype of an intermediate result; by default the dtype of `expected`.
    """
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    value = expected.detach().double()
    size = value.abs().max().item() if scale is None else scale
    bound = torch.full_like(value, model_error(products, arithmetic or expected.dtype, terms) * size)
    assert_within(actual, Expected(value, bound), name)


def assert_repeats(actual: Tensor, expected: Tensor, backend: str, *, products: int = 1, terms: int) -> None:
    """Assert that two calls of one op by `backend` give the same bits, if the project's kernels compute them.

    The reference computes with torch's products, whose order of summation may differ between two calls.
    """
    if backend == "reference":
        assert_same_function(actual, expected, products=2 * products, terms=terms)  # each call rounds its result
    else:
        assert torch.equal(actual, expected), f"{backend}: other bits"


def assert_same_gradients(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], products: int = 20, terms: int = 32
) -> None:
    """Assert that two computations of one model's gradients agree within `model_error`, relative to the largest
    element.

    The gradient of one parameter may be small because its terms cancel, as that of an attention's key bias does.
    products: number of successive products, forward and backward.
    terms: length of their sums.
    """
    assert actual.keys() == expected.keys()
    scale = max((gradient.abs().max().item() for gradient in expected.values() if gradient.numel()), default=0.0)
    for name, gradient in expected.items():
        assert_same_function(actual[name], gradient, name, products=products, terms=terms, scale=scale)
