"""The bounds of python/numerics/tolerances.py: correct computations keep them in any order of summation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qlora_kernels.format import reference
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.support.linear_formulas import Arithmetic, Dropout, assert_lora
from tests.support.problems import DTYPES, dtype_name, gaussian
from tests.support.tolerances import assert_same_function, assert_within, exactly, gamma, product

M, N, K, R, BLOCKSIZE, SCALING, P = 24, 40, 320, 8, 64, 1.5, 0.25
SEED = torch.tensor([12345])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@dataclass
class Computation:
    """A LoRA linear with dropout as a fused kernel computes it: fp32 sums, one rounding of s, ds and the results."""

    dtype: torch.dtype
    packed: Tensor
    absmax: Tensor
    x: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    grad_y: Tensor
    keep: Tensor
    scale: float = keep_scale(P)
    scaling: float = SCALING
    product_dtype: torch.dtype | None = None
    rounds_w: bool = True
    rounds_s: bool = True
    stored_s: torch.dtype | None = None
    order: Tensor | None = None

    def weight(self) -> Tensor:
        kind = self.dtype if self.rounds_w else torch.float32
        return reference.dequantize_nf4(self.packed, self.absmax, BLOCKSIZE, torch.Size((N, K)), kind)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a product with fp32 sums, in `order` if given."""
        a, b = a.float(), b.float()
        if self.product_dtype is not None:
            a, b = a.to(self.product_dtype).float(), b.to(self.product_dtype).float()
        if self.order is None:
            return a @ b
        result = torch.zeros(a.shape[0], b.shape[1])
        for k in self.order[self.order < a.shape[1]].tolist():
            result += a[:, k : k + 1] * b[k : k + 1]
        return result

    def results(self) -> tuple[Tensor, ...]:
        T = self.dtype
        x, w, g = self.x, self.weight(), self.grad_y
        A, B = self.lora_A.to(T), self.lora_B.to(T)
        dropped = x.float() * self.keep
        s = self.matmul(dropped, A.T) * self.scale
        stored = s.to(T) if self.stored_s is None else s.to(self.stored_s).to(T)
        s = stored if self.rounds_s else s
        y = self.matmul(x, w.T) + self.scaling * self.matmul(s, B.T) + self.bias.float()
        ds = (self.scaling * self.matmul(g, B)).to(T)
        grad_x = self.matmul(g, w) + self.scale * self.keep * self.matmul(ds, A)
        grad_A = self.scale * self.matmul(ds.T, dropped)
        grad_B = self.scaling * self.matmul(g.T, stored)
        return y.to(T), stored, grad_x.to(T), grad_A, grad_B


def right(dtype: torch.dtype) -> Computation:
    packed, absmax = reference.quantize_nf4(gaussian(N, K) / K**0.5, BLOCKSIZE)
    return Computation(
        dtype,
        packed,
        absmax,
        gaussian(M, K, dtype=dtype, seed=1),
        gaussian(N, dtype=dtype, seed=2),
        gaussian(R, K, seed=3) / K**0.5,
        gaussian(N, R, seed=4),
        gaussian(M, N, dtype=dtype, seed=5),
        dropout_keep(SEED, M, K, P),
    )


def check(computation: Computation) -> None:
    """Compare with the expected results of `right`."""
    truth = right(computation.dtype)
    inputs = (truth.x, truth.weight(), truth.bias, truth.lora_A, truth.lora_B, truth.grad_y)
    arithmetic = Arithmetic(computation.dtype, composed=False)
    assert_lora(computation.results(), inputs, SCALING, Dropout(truth.keep, truth.scale), arithmetic)


@dtypes
@pytest.mark.parametrize("order", ["torch", "ascending", "descending", "shuffled"])
def test_any_order_of_summation_is_within_bounds(dtype: torch.dtype, order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    orders = {
        "torch": None,
        "ascending": torch.arange(K),
        "descending": torch.arange(K).flip(0),
        "shuffled": torch.randperm(K, generator=generator),
    }
    check(replace(right(dtype), order=orders[order]))


def zeroed(tensor: Tensor, *index: int | slice) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = 0
    return tensor


def swapped(packed: Tensor) -> Tensor:
    """Swap the nibbles in one of 6400 bytes."""
    packed = packed.clone()
    byte = int((packed >> 4 != packed & 15).nonzero()[1000])
    packed[byte] = packed[byte] >> 4 | packed[byte] << 4 & 0xF0
    return packed


def off_by(absmax: Tensor, factor: float) -> Tensor:
    absmax = absmax.clone()
    absmax[77] *= factor
    return absmax


FAULTS = {
    "a dropped scaling": lambda c: replace(c, scaling=1.0),
    "a dropped scale of dropout": lambda c: replace(c, scale=1.0),
    "swapped nibbles in one byte": lambda c: replace(c, packed=swapped(c.packed)),
    "one absmax off by 1 / 127": lambda c: replace(c, absmax=off_by(c.absmax, 1 + 1 / 127)),
    "one absmax of another block": lambda c: replace(c, absmax=off_by(c.absmax, float(c.absmax[78] / c.absmax[77]))),
    "the last column of K left out": lambda c: replace(c, x=zeroed(c.x, slice(None), -1)),
    "one rank left out": lambda c: replace(c, lora_B=zeroed(c.lora_B, slice(None), R - 1)),
    "no bias": lambda c: replace(c, bias=torch.zeros_like(c.bias)),
    "the last token left out of the factors' gradients": lambda c: replace(c, grad_y=zeroed(c.grad_y, M - 1)),
    "the mask shifted by one element": lambda c: replace(c, keep=c.keep.reshape(-1).roll(1).view(M, K)),
    "one element dropped that is kept": lambda c: replace(c, keep=zeroed(c.keep, *c.keep.nonzero()[4321].tolist())),
    "products of bf16": lambda c: replace(c, product_dtype=torch.bfloat16),
    "products of fp16": lambda c: replace(c, product_dtype=torch.float16),
    "W as it is, not rounded to x's type": lambda c: replace(c, rounds_w=False),
    "y from an unrounded s": lambda c: replace(c, rounds_s=False),
    "s rounded to bf16 on its way": lambda c: replace(c, stored_s=torch.bfloat16),
    "s rounded to fp16 on its way": lambda c: replace(c, stored_s=torch.float16),
}
NO_FAULT = {  # faults that change no rounding for the dtype
    torch.float32: {"W as it is, not rounded to x's type", "y from an unrounded s"},
    torch.bfloat16: {"products of bf16", "products of fp16", "s rounded to bf16 on its way"},
    torch.float16: {"products of fp16", "s rounded to fp16 on its way"},
}


@pytest.mark.parametrize(
    ("dtype", "fault"),
    [(dtype, fault) for dtype in DTYPES for fault in FAULTS if fault not in NO_FAULT[dtype]],
    ids=lambda value: dtype_name(value) if isinstance(value, torch.dtype) else value,
)
def test_a_fault_is_out_of_bounds(dtype: torch.dtype, fault: str) -> None:
    with pytest.raises(AssertionError, match="out of bounds"):
        check(FAULTS[fault](right(dtype)))


def test_bounds_grow_with_the_square_root_of_long_sums() -> None:
    u = 2.0**-24
    assert gamma(10, torch.float32) == pytest.approx(10 * u)
    assert gamma(6400, torch.float32) == pytest.approx(8 * 80 * u, rel=1e-3)


def test_known_roundings_leave_no_error() -> None:
    x = gaussian(5, 7)
    rounded = exactly(x).to(torch.bfloat16)
    assert not rounded.error.any()
    assert torch.equal(rounded.value, x.bfloat16().double())
    assert not exactly(x).scaled(2.0).error.any()
    assert exactly(x).scaled(3.0).error.all()


def test_errors_name_wrong_elements() -> None:
    expected = product(exactly(torch.ones(2, 3)), exactly(torch.ones(3, 2)))
    actual = torch.full((2, 2), 3.0)
    assert_within(actual, expected)
    actual[1, 0] = 3.1
    with pytest.raises(AssertionError, match=r"y: 1 of 4 elements are out of bounds; the worst is \(1, 0\): 3.09"):
        assert_within(actual, expected, "y")
    with pytest.raises(AssertionError, match="not finite"):
        assert_within(actual * torch.inf, expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_within(actual[:1], expected)
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_same_function(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]))
