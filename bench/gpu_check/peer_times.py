"""Peer step: times of bitsandbytes' 4-bit product, as kernel_times measures this project's, in a process of its own.

bitsandbytes' library ends the process when one of its kernels fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial

import torch

from .. import graphs
from ..graphs import Call
from . import rows as rows_module
from .cases import TINY_SIZES
from .kernel_times import MOST_COPIES, SAMPLES
from .rows import Rows, step_arguments
from .timed_sizes import ROWS, SHAPES


def peer_calls(w: torch.Tensor, x: torch.Tensor, copies: int) -> list[Call]:
    """Return the calls of bitsandbytes' 4-bit product over `copies` copies of the weight."""
    bitsandbytes = importlib.import_module("bitsandbytes")
    packed, state = bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    return [partial(bitsandbytes.matmul_4bit, x, packed.clone().t(), state) for _ in range(copies)]


def measure(
    rows: Rows,
    shape: tuple[int, int],
    row_counts: Sequence[int],
    flush: torch.Tensor,
    samples: int = SAMPLES,
    most: int = MOST_COPIES,
) -> None:
    """Time the product for one weight [N, K] at every number of rows."""
    N, K = shape
    w = torch.randn(N, K, device=rows_module.DEVICE, dtype=torch.bfloat16) / K**0.5
    copies = graphs.copies_beyond_l2(w.numel() // 2, most)
    for M in row_counts:
        x = torch.randn(M, K, device=rows_module.DEVICE, dtype=torch.bfloat16)
        seconds = graphs.median_seconds(peer_calls(w, x, copies), samples, flush)
        rows.add(backend="bitsandbytes", path="matmul_4bit", M=M, N=N, K=K, us=seconds * 1e6)


def main() -> int:
    """Run the step; without bitsandbytes it writes one row."""
    arguments = step_arguments(__doc__)
    rows = Rows(arguments.out, "times")
    if importlib.util.find_spec("bitsandbytes") is None:
        rows.add(backend="bitsandbytes", skipped="bitsandbytes is not installed")
    elif arguments.tiny:
        measure(rows, (TINY_SIZES.N, TINY_SIZES.K), (TINY_SIZES.M,), graphs.flush_buffer(1 << 12), 1, 1)
    else:
        flush = graphs.flush_buffer()
        for shape in SHAPES:
            measure(rows, shape, ROWS, flush)
    return 0


if __name__ == "__main__":
    sys.exit(main())
