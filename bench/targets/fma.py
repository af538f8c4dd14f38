"""Targets of machines whose products run on fp32 multiply-adds for every dtype.

These are processors with AVX2, as most laptops, those with AVX-512 and without BF16, and Intel's with AVX512-BF16 and
without usable AMX.
"""

from __future__ import annotations

from .formulas import speedup_over
from .rows import from_tokens
from .target import FMA, Target

TARGETS = tuple(
    Target(
        f"forward, {words} x, M >= 64 over dense",
        "linear_nf4",
        speedup_over("dense"),
        from_tokens(64, dtype),
        at_least=0.9,
        machine=FMA,
    )
    for words, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
)
