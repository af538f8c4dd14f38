"""Integer sizes rounded up. Triton's functions of these names look for constexprs, which takes microseconds a call."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least n."""
    return cdiv(n, multiple) * multiple


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()
