"""The table of docs/benchmarks.md about machines without AVX-512: our layers beside dense ones, in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import table
from .row_file import Row
from .targets.target import AVX2

BEGIN = "<!-- begin: without AVX-512, of python -m bench.report -->"

NO_ROWS = "No committed rows yet. The command above measures them."

_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def without_avx512(rows: Sequence[Row]) -> str:
    """Return the table of the forward products with warm weights; NO_ROWS without rows.

    rows: merged rows of any machines; those of machines with AVX2, or limited to it, are used.
    """
    ours = {
        (str(row["machine"]), row["N"], row["K"], row["M"], row["dtype"]): row
        for row in rows
        if (row["op"], row["contender"], row["mode"]) == ("linear_nf4", "ours", "warm")
        if "median_us" in row and AVX2.has(row)
    }
    machines = list(dict.fromkeys(key[0] for key in ours))
    header = ["layer (N x K)", "M"]
    header += [name for dtype in _DTYPES.values() for name in (f"ours, {dtype} x", f"dense {dtype}", "dense / ours")]
    parts = []
    for machine in machines:
        shapes = dict.fromkeys(key[1:4] for key in ours if key[0] == machine)
        lines = []
        for N, K, M in shapes:
            found = [ours.get((machine, N, K, M, dtype)) for dtype in _DTYPES]
            lines.append([f"{N} x {K}", str(M), *(cell for row in found for cell in _cells(row))])
        ratios = [row["speedup"]["dense"] for key, row in ours.items() if key[0] == machine and key[4] == "float32"]
        least = f" The smallest ratio to dense fp32 is {min(ratios):.2f}x." if ratios else ""
        parts.append(f"{machine}; medians in ms, warm weights.{least}\n\n{table(header, lines)}")
    return "\n\n".join(parts) if parts else NO_ROWS


def _cells(row: Row | None) -> tuple[str, str, str]:
    """Return our time, the dense layer's and the ratio."""
    if row is None or "dense" not in row["speedup"]:
        return "", "", ""
    ours, ratio = row["median_us"] / 1e3, row["speedup"]["dense"]
    return _ms(ours), _ms(ours * ratio), f"{ratio:.2f}x"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
