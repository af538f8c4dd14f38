"""Runs that are limited to a smaller instruction set than the machine has, as machines without that set compute.

`python -m bench.run --limit avx2` sets the variables below in a process of its own. The rows name the limit with the
machine, so that no table mixes them with rows of the whole machine. Only ours and dense layers run: contenders from
other packages choose their instructions by cpuid, and torch's int8 and int4 products take minutes without AVX-512.
"""

from __future__ import annotations

import os

from .registry import Contender
from .row_file import Row

LIMITS = {
    "avx2": {
        "QLORA_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
"""Instruction set -> the environment that limits our kernels, torch's own kernels, oneDNN and MKL to it."""

_WORDS = ", limited to "


def limit() -> str | None:
    """Return the instruction set that this process is limited to by all variables of LIMITS, or None."""
    for isa, variables in LIMITS.items():
        if all(os.environ.get(name) == value for name, value in variables.items()):
            return isa
    return None


def suffix() -> str:
    """Return the end of the machine's name: ", limited to AVX2", or "" without a limit."""
    isa = limit()
    return f"{_WORDS}{isa.upper()}" if isa else ""


def is_limited(row: Row) -> bool:
    """Whether a row was measured under a limit."""
    return _WORDS in str(row.get("machine", ""))


def obeys(contender: Contender) -> bool:
    """Whether a contender may run: it obeys the limit and is compared under it, or there is none."""
    return limit() is None or contender.name in ("ours", "dense")
