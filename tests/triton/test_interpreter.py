"""The fixed interpreter: bfloat16 equals torch's, and each planted memory fault is detected."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.support import tolerances
from tests.support.tolerances import assert_within, exactly, product

N = 128


@triton.jit
def arithmetic_kernel(p_x, p_y, p_out, OP: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(p_x + o), tl.load(p_y + o)
    if OP == "add":
        result = x + y
    elif OP == "mul":
        result = x * y
    elif OP == "scale":
        result = x * 0.3
    elif OP == "sub":
        result = x - y
    elif OP == "max":
        result = tl.maximum(x, y)
    elif OP == "less":
        result = tl.where(x < y, x, y)
    elif OP == "fma":
        result = tl.fma(x, y, x)
    elif OP == "abs":
        result = tl.abs(x)
    else:
        result = tl.full((N,), 1.5, tl.bfloat16)
    tl.store(p_out + o, result)


EXPECTED = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "scale": lambda x, y: x * torch.tensor(0.3).bfloat16(),
    "sub": lambda x, y: x - y,
    "max": torch.maximum,
    "less": torch.minimum,
    "fma": lambda x, y: (x.float() * y.float() + x.float()).bfloat16(),
    "abs": lambda x, y: x.abs(),
    "full": lambda x, y: torch.full_like(x, 1.5),
}


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("op", EXPECTED)
def test_bfloat16_arithmetic_equals_torch(op):
    x, y, out = numbers(0, N).bfloat16(), numbers(1, N).bfloat16(), torch.empty(N, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, OP=op, N=N)
    assert torch.equal(out, EXPECTED[op](x, y))


@triton.jit
def cast_kernel(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))


def test_casts_round_to_nearest_even():
    bits = torch.randint(0, 2**31, (4096,), generator=torch.Generator().manual_seed(2)).int()
    x = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, 1.00390625, 1.01171875])])
    x = torch.cat([x[~x.isnan()], torch.zeros(8192)])[:8192]
    out = torch.empty(8192, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, N=8192)
    assert torch.equal(out, x.bfloat16())
    back = torch.empty(8192)
    cast_kernel[(1,)](out, back, N=8192)
    assert torch.equal(back, out.float())


@triton.jit
def reduce_kernel(p_x, p_sum, p_max, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(p_x + o[:, None] * N + o[None, :])
    tl.store(p_sum + o, tl.sum(x, axis=1))
    tl.store(p_max + o, tl.max(x, axis=1))


def test_reductions():
    x = numbers(3, 16, 16).bfloat16()
    total, top = torch.empty(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, total, top, N=16)
    assert_within(total, tolerances.total(exactly(x).T).to(torch.bfloat16))
    assert torch.equal(top, x.amax(1))


@triton.jit
def dot_kernel(p_a, p_b, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tile = o[:, None] * N + o[None, :]
    tl.store(p_out + tile, tl.dot(tl.load(p_a + tile), tl.load(p_b + tile)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype):
    a, b, out = numbers(4, 32, 32).to(dtype), numbers(5, 32, 32).to(dtype), torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, N=32)
    assert_within(out, product(exactly(a), exactly(b)))


@triton.jit
def shifted_copy_kernel(p_x, p_out, load_shift, store_shift, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_out + o + store_shift, tl.load(p_x + o + load_shift))


@pytest.mark.parametrize(("load_shift", "store_shift", "kind"), [(1, 0, "load"), (-1, 0, "load"), (0, 1, "store")])
def test_out_of_bounds_raises(load_shift, store_shift, kind):
    arena = torch.zeros(3, N)
    with pytest.raises(InterpreterError, match=f"out-of-bounds {kind}"):
        shifted_copy_kernel[(1,)](arena[1], torch.zeros(N), load_shift, store_shift, N=N)


@triton.jit
def overlapping_store_kernel(p_out, STEP: tl.constexpr, DIVIDE: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0)
    tl.store(p_out + i * STEP + tl.arange(0, N) // DIVIDE, i.to(tl.float32))


def test_races_raise():
    out = torch.zeros(4 * N)
    with pytest.raises(InterpreterError, match="where another program has stored"):
        overlapping_store_kernel[(2,)](out, STEP=N - 1, DIVIDE=1, N=N)
    with pytest.raises(InterpreterError, match="writes an address twice"):
        overlapping_store_kernel[(1,)](out, STEP=N, DIVIDE=2, N=N)
    overlapping_store_kernel[(4,)](out, STEP=N, DIVIDE=1, N=N)
    assert out[::N].tolist() == [0.0, 1.0, 2.0, 3.0]
