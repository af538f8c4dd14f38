"""One planted fault of the CPU kernels."""

from __future__ import annotations

from typing import NamedTuple

BEST = "best"
"""The best instruction set of this machine without AMX: avx512_bf16, avx512, avx2 or portable."""

AMX = "amx_bf16_emulated"
BF16 = "avx512_bf16"


class Fault(NamedTuple):
    """A text of a source that occurs once, and a wrong one in its place (tests/support/planted_source.py).

    file: below csrc/cpu.   test: the beginning of the node ids of the tests that detect it; those with another
    instruction set or backend are left out.   isa: the instruction set, AMX, BF16, BEST or another name.
    first: a part of the node ids of the tests that run first.
    """

    name: str
    file: str
    right: str
    wrong: str
    test: str
    isa: str = BEST
    first: str = ""
