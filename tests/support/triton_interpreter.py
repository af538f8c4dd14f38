"""Fixes Triton's interpreter (TRITON_INTERPRET=1) for tests: bfloat16 arithmetic, and errors for memory faults.

The stock interpreter (Triton 3.7) keeps bfloat16 as uint16 and silently computes with these integers, it truncates
where the hardware rounds to nearest even, and it accesses any address that a kernel computes. `install()` fixes this:

    bfloat16      arithmetic, comparison, dot, fma, clamp, sum and max go through fp32 and round to nearest even
    bounds        an access outside the launch's tensors raises IndexError
    races         two programs, or two lanes of one store, that write one address raise RuntimeError
    inline asm    still refused: kernels have an equivalent in plain Triton behind a constexpr

No interpreter shows layouts, shared memory, num_warps, num_stages, races inside the lowered program, or tf32.
Installing is idempotent. tests/triton/test_interpreter.py plants one fault of each kind.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
NAN = np.uint16(0x7FC0)


def is_bf16(handle: Handle) -> bool:
    """Whether the handle's elements are bfloat16, which are stored as uint16."""
    return handle.dtype.scalar == tl.bfloat16


def widen(handle: Handle) -> np.ndarray:
    """Return the handle's numbers: fp32 for bfloat16, otherwise its data."""
    return bf16_to_fp32(handle.data) if is_bf16(handle) else handle.data


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Convert uint16 bit patterns of bfloat16 to fp32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """Convert fp32 to uint16 bit patterns of bfloat16, to nearest, ties to even; every NaN to one quiet NaN."""
    numbers = np.asarray(numbers, dtype=np.float32)
    bits = np.ascontiguousarray(numbers).view(np.uint32).reshape(numbers.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), NAN, rounded.astype(np.uint16))


def narrow(numbers: np.ndarray, dtype: tl.dtype) -> Handle:
    """Return a handle of `dtype`'s scalar type; booleans, from comparisons, stay booleans."""
    if numbers.dtype == np.bool_:
        return Handle(numbers, tl.int1)
    return Handle(fp32_to_bf16(numbers) if dtype.scalar == tl.bfloat16 else numbers, dtype.scalar)


def _wrap(owner: type, name: str, *, when: Any, instead: Any) -> None:
    """Replace owner.name by `instead` for the calls for which `when` is true."""
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def mended(self, *args, **kwargs):
        return instead(self, *args, **kwargs) if when(self, *args) else stock(self, *args, **kwargs)

    setattr(owner, name, mended)


def _mend_bfloat16() -> None:
    builder, reduce = interpreter.InterpreterBuilder, interpreter.ReduceOps

    def cast(self, src, dst_type, *rounding):
        numbers, target = widen(src), dst_type.scalar
        if target == tl.bfloat16:
            return Handle(fp32_to_bf16(numbers.astype(np.float32)), target)
        return Handle(numbers.astype(interpreter._get_np_dtype(target)), target)

    def reduced(self, operand, function):
        numbers = np.asarray(function(widen(operand.handle), axis=self.axis, keepdims=self.keep_dims))
        bits = fp32_to_bf16(numbers)
        return self.to_tensor(bits if bits.shape else bits[()], operand.dtype)

    def minmax(self, operand, val_reduce_op, idx_reduce_op=None):
        operand = operand[0] if isinstance(operand, tuple) else operand
        if idx_reduce_op is not None:
            raise NotImplementedError("argmin and argmax of bfloat16 in the interpreter")
        return reduced(self, operand, val_reduce_op)

    cast_applies = lambda self, src, dst, *_: tl.bfloat16 in (src.dtype.scalar, dst.scalar)  # noqa: E731
    _wrap(builder, "cast_impl", when=cast_applies, instead=cast)
    _wrap(
        builder,
        "create_fp_to_fp",
        when=lambda self, src, dst, mode: cast_applies(self, src, dst) and mode != interpreter._ir.ROUNDING_MODE.RTZ,
        instead=cast,
    )
    _wrap(
        builder,
        "binary_op",
        when=lambda self, a, b, op: is_bf16(a) and op not in BITWISE,
        instead=lambda self, a, b, op: narrow(op(widen(a), widen(b)), a.dtype),
    )
    _wrap(
        builder,
        "unary_op",
        when=lambda self, a, op: is_bf16(a),
        instead=lambda self, a, op: narrow(op(widen(a)), a.dtype),
    )
    _wrap(
        builder,
        "create_fma",
        when=lambda self, a, b, c: is_bf16(c),
        instead=lambda self, a, b, c: narrow(widen(a) * widen(b) + widen(c), c.dtype),
    )
    _wrap(
        builder,
        "create_clampf",
        when=lambda self, a, *_: is_bf16(a),
        instead=lambda self, a, low, high, nans: narrow(np.clip(widen(a), widen(low), widen(high)), a.dtype),
    )
    _wrap(
        builder,
        "create_dot",
        when=lambda self, a, b, *_: is_bf16(a) or is_bf16(b),
        instead=lambda self, a, b, c, *_: Handle(np.matmul(widen(a), widen(b)) + widen(c), c.dtype.scalar),
    )
    _wrap(
        reduce,
        "sum",
        when=lambda self, operand: operand.dtype.scalar == tl.bfloat16,
        instead=lambda self, operand: reduced(self, operand, np.sum),
    )
    _wrap(
        reduce,
        "min_max",
        when=lambda self, operand, *_: (
            (operand[0] if isinstance(operand, tuple) else operand).dtype.scalar == tl.bfloat16
        ),
        instead=minmax,
    )
    builder.get_bf16 = lambda self, value: Handle(fp32_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)


class Memory:
    """The tensors of the current launch, and the program that wrote each of their bytes."""

    def __init__(self, tensors: list[Any]) -> None:
        spans = sorted({_span(t) for t in tensors if t.numel()})
        self.low = np.array([low for low, _ in spans], dtype=np.uint64)
        self.high = np.array([high for _, high in spans], dtype=np.uint64)
        # Overlapping views (two slices of one buffer) share bytes, so one owner map covers all of them.
        self.owners: dict[int, np.ndarray] = {}

    def check(self, kind: str, addresses: np.ndarray, width: int, program: tuple[int, ...]) -> None:
        """Check the bounds of accesses of `width` bytes, and for stores also the owners."""
        if addresses.size == 0:
            return
        # The last span that begins at or below the address; a longer span that begins earlier may also contain it.
        inside = np.zeros(addresses.shape, dtype=bool)
        for low, high in zip(self.low, self.high, strict=True):
            inside |= (addresses >= low) & (addresses + np.uint64(width) <= high)
        if not inside.all():
            raise IndexError(
                f"out-of-bounds {kind} by program {program}: {int((~inside).sum())} of {inside.size} lanes, "
                f"first at {_distance(int(addresses[~inside][0]), self.low, self.high)}"
            )
        if kind == "store":
            self._claim(addresses, program)

    def _claim(self, addresses: np.ndarray, program: tuple[int, ...]) -> None:
        if np.unique(addresses).size != addresses.size:
            raise RuntimeError(f"write race inside program {program}: one store writes an address twice")
        # Grid coordinates are far below 2**20 in tests, so that all three fit in one int64.
        owner = np.int64(1 + program[0] + (program[1] << 20) + (program[2] << 40))
        for index, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            mine = addresses[(addresses >= low) & (addresses < high)]
            if mine.size == 0:
                continue
            owners = self.owners.setdefault(index, np.zeros(int(high - low), dtype=np.int64))
            offsets = (mine - low).astype(np.int64)
            foreign = (owners[offsets] != 0) & (owners[offsets] != owner)
            if foreign.any():
                raise RuntimeError(f"write race: program {program} stores where another program has stored")
            owners[offsets] = owner


def _span(tensor: Any) -> tuple[int, int]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + elements * tensor.element_size()


def _distance(address: int, low: np.ndarray, high: np.ndarray) -> str:
    gaps = [(address - int(h) if address >= int(h) else int(lo) - address) for lo, h in zip(low, high, strict=True)]
    return f"{min(gaps, default=0)} bytes from the nearest tensor of the launch"


_memory: Memory | None = None


def _check_memory() -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_init, stock_call = executor._init_args_hst, executor.__call__

    def check(self, kind, pointers, mask):
        if _memory is None:
            return
        active = np.broadcast_to(np.asarray(getattr(mask, "data", mask)), pointers.data.shape).astype(bool)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        _memory.check(kind, np.asarray(pointers.data)[active].astype(np.uint64), width, self.grid_idx)

    def load(self, pointers, mask, *rest):
        check(self, "load", pointers, mask)
        return stock_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        check(self, "store", pointers, mask)
        return stock_store(self, pointers, value, mask, *rest)

    def init_args(self, args_dev, kwargs):
        global _memory
        args, kwargs = stock_init(self, args_dev, kwargs)
        values = [getattr(value, "base", value) for value in (*args, *kwargs.values())]
        _memory = Memory([value for value in values if hasattr(value, "data_ptr")])
        return args, kwargs

    def call(self, *args, **kwargs):
        global _memory
        try:
            return stock_call(self, *args, **kwargs)
        finally:
            _memory = None

    builder.create_masked_load, builder.create_masked_store = load, store
    executor._init_args_hst, executor.__call__ = init_args, call


@functools.cache
def install() -> None:
    """Fix the interpreter of this process. Needs TRITON_INTERPRET=1 before triton's first import."""
    _mend_bfloat16()
    _check_memory()
