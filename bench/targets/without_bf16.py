"""Targets of machines without AVX512-BF16, as most laptops: products run on fp32 multiply-adds for every dtype."""

from __future__ import annotations

from ..row_file import Row
from .formulas import speedup_over
from .target import WITHOUT_BF16, Target


def _from_64(dtype: str, row: Row) -> bool:
    return bool(row["dtype"] == dtype and row["M"] >= 64)


TARGETS = tuple(
    Target(
        f"without AVX512-BF16: {words} M >= 64 over dense",
        "linear_nf4",
        speedup_over("dense"),
        lambda row, dtype=dtype: _from_64(dtype, row),  # type: ignore[misc]
        at_least=0.9,
        machine=WITHOUT_BF16,
    )
    for words, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
)
