"""Predicted times of one linear layer on GPUs, by a model and not by measurement.

    python -m bench.roofline [--update docs/notebook/roofline.md]        print the page, or write it

The model divides bytes by sustained bandwidth, products by the sustained matmul rate, and SASS instructions by issue
slots, and adds a fixed cost for each launch.
**Predicted, not run on a GPU.**

The process of the GPU check imports this file and neither the package nor torch (bench/gpu_check/__main__.py).

The weight is N x K = 4096 x 4096 in NF4 with double-quantized constants, x is bf16, the rank is 16.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

N = K = 4096
WEIGHTS = N * K
PACKED, CODED = 0.516, 2.516
"""Bytes for each weight: packed with its constants; the same read and 16 bits written."""


@dataclass(frozen=True)
class GPU:
    """Sustained rates of a GPU per second: DRAM bytes, dense bf16 flops, issued lane-instructions, bytes from L2."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    issues_per_s: float
    l2_bytes_per_s: float


GPUS = {
    80: GPU("A100", 1.75e12, 250e12, 19.5e12, 4.0e12),
    86: GPU("RTX 3090", 0.84e12, 62e12, 17.8e12, 2.5e12),
    89: GPU("RTX 4090", 0.92e12, 155e12, 41e12, 5.0e12),
    90: GPU("H100", 3.0e12, 700e12, 29.6e12, 5.5e12),
    100: GPU("B200", 7.0e12, 1600e12, 35e12, 9.0e12),
    120: GPU("RTX 5090", 1.6e12, 200e12, 52e12, 6.0e12),
}

DEQUANTIZE, PEER_DEQUANTIZE = 5.95, 26.0
"""SASS instructions for each weight: dequantize_nf4.cu, and bitsandbytes' kernel without the second level."""

SMALL_M, GEMM = {1: 5.2, 2: 6.7, 4: 9.7}, {16: 8.5, 32: 9.3, 64: 10.9}
"""SASS instructions for each weight: linear_nf4_small_m.cu by rows of x, linear_nf4_gemm.cu by rows of a block."""

PAIRS = {8: 1.72, 16: 2.0, 24: 2.29, 32: 2.58, 48: 4.58, 64: 5.16}
"""The same of linear_nf4_pairs.cu by rows of its tile; 48 and 64 are two tiles, which both decode each weight."""

PAIRS_MOST_TILE = 32
"""Rows of x of the largest tile."""

PAIR_ROWS_OF_BLOCK = 32
"""Rows of the weight in a block of linear_nf4_pairs.cu at this size; each block reads all of x from L2."""

PAIRS_MARGIN = 1.1
"""How much faster linear_nf4_pairs.cu must be in the model to be chosen."""

WGMMA = 3.93
"""SASS instructions for each weight that a warp of linear_nf4_wgmma.cu executes on average; half of the warps issue one
copy in four stages."""

WGMMA_TILES, WGMMA_ROWS, WGMMA_MULTIPROCESSORS = (64, 128, 256), 128, 132
"""Rows of x and of the weight in a block of linear_nf4_wgmma.cu, and the multiprocessors of an H100."""

WGMMA_MOST_ROWS = 1024
"""Maximum number of rows of x of linear_nf4_wgmma.cu."""

WGMMA_RATE = 0.85
"""Assumed fraction of the library's rate for wgmma with interleaved decoding."""

MMA_SYNC = 0.6
"""Assumed fraction of the library's rate for mma.sync with interleaved decoding."""

LAUNCH, FUSED_ENDS, SMALL_ENDS, PAIRS_ENDS, PRODUCT_ENDS = 3.0, 2.5, 1.0, 1.3, 1.5
"""Microseconds of a launch with its tail, and of start and end of a fused kernel, a small-M kernel, the pair-table
kernel, which fills 32 KiB of shared memory, and a library product.
"""

SKINNY, ADDMM, COPY = 0.7, 0.85, 0.9
"""Fraction of DRAM bandwidth of a product with r columns, of a product over r that adds to its result, and of the
kernels that copy their operand beside such a product.
"""

STEP_LAUNCH = 0.75
"""Microseconds that a launch adds if the queue is full."""


def dequantize_us(gpu: GPU, instructions: float = DEQUANTIZE, launches: int = 1) -> float:
    """Return the time in microseconds of decoding the weight into a workspace."""
    return max(CODED * WEIGHTS / gpu.bytes_per_s, instructions * WEIGHTS / gpu.issues_per_s) * 1.1e6 + LAUNCH * launches


def product_us(gpu: GPU, M: int) -> float:
    """Return the time in microseconds of the library's product of M rows with the decoded weight."""
    moved = 2.0 * WEIGHTS + 2.0 * M * (N + K)
    return max(2.0 * M * WEIGHTS / gpu.flops_per_s, moved / gpu.bytes_per_s) * 1e6 + PRODUCT_ENDS


def decoded_us(gpu: GPU, M: int) -> float:
    """Return the time in microseconds of decoding and the library's product, without L2 reuse of the workspace."""
    return dequantize_us(gpu) + product_us(gpu, M)


def fused_us(gpu: GPU, M: int) -> float:
    """Return the time in microseconds of the fused tensor-core kernel, which decodes each weight once per 64 rows."""
    rows = next((rows for rows in GEMM if rows >= M), 64)
    tiles = math.ceil(M / rows)
    moved = PACKED * WEIGHTS + 2.0 * M * (N + K)
    flops = 2.0 * tiles * rows * WEIGHTS / (MMA_SYNC * gpu.flops_per_s)
    return max(moved / gpu.bytes_per_s, tiles * GEMM[rows] * WEIGHTS / gpu.issues_per_s, flops) * 1e6 + FUSED_ENDS


def small_m_us(gpu: GPU, M: int = 1) -> float:
    """Return the time in microseconds of the fp32 kernel for up to four rows of x."""
    instructions = next(count for rows, count in SMALL_M.items() if rows >= M)
    return max(PACKED * WEIGHTS / gpu.bytes_per_s, instructions * WEIGHTS / gpu.issues_per_s) * 1e6 + SMALL_ENDS


def pairs_us(gpu: GPU, M: int) -> float:
    """Return the time in microseconds of the pair-table kernel for up to 64 rows of x."""
    rows = next(rows for rows in PAIRS if rows >= M)
    tiles = math.ceil(rows / PAIRS_MOST_TILE)
    from_l2 = PACKED * WEIGHTS + 2.0 * M * K * (N / PAIR_ROWS_OF_BLOCK)
    seconds = (
        PACKED * WEIGHTS / gpu.bytes_per_s,
        from_l2 / gpu.l2_bytes_per_s,
        PAIRS[rows] * WEIGHTS / gpu.issues_per_s,
        # A multiprocessor issues 128 lane-instructions a clock and moves one wavefront of 128 bytes to or from L1.
        tiles * pair_wavefronts(rows // tiles) / 2048 * WEIGHTS * 128 / gpu.issues_per_s,
        2.0 * rows * WEIGHTS / (MMA_SYNC * gpu.flops_per_s),
    )
    return max(seconds) * 1e6 + PAIRS_ENDS


def wgmma_us(gpu: GPU, M: int) -> float:
    """Return the time in microseconds of the wgmma kernel, which sm_90 alone has."""
    return max(wgmma_limits(gpu, M).values()) * 1e6 + FUSED_ENDS


def wgmma_limits(gpu: GPU, M: int) -> dict[str, float]:
    """Return the seconds that each resource of the GPU needs for the wgmma kernel alone, by name."""
    rows = next((rows for rows in WGMMA_TILES if rows >= M), max(WGMMA_TILES))
    tiles = math.ceil(M / rows)
    blocks = math.ceil(N / WGMMA_ROWS) * tiles
    splits = max(1, min(WGMMA_MULTIPROCESSORS // blocks, K // 64 // 8))
    partial = 2 * 4.0 * splits * M * N if splits > 1 else 0.0
    return {
        "DRAM": (PACKED * WEIGHTS + 2.0 * M * (N + K)) / gpu.bytes_per_s,
        "L2": (tiles * PACKED * WEIGHTS + 2.0 * M * K * (N / WGMMA_ROWS) + partial) / gpu.l2_bytes_per_s,
        "issue": tiles * WGMMA * WEIGHTS / gpu.issues_per_s,
        "shared memory": tiles * wgmma_wavefronts(rows) / 8192 * WEIGHTS * 128 / gpu.issues_per_s,
        "tensor cores": 2.0 * tiles * rows * WEIGHTS / (WGMMA_RATE * gpu.flops_per_s),
    }


def wgmma_wavefronts(rows: int) -> int:
    """Return the wavefronts of shared memory for 8192 weights, one stage of a block of linear_nf4_wgmma.cu.

    256 lookups, 128 to read the packed bytes, 32 to write them, and x, which is written once and read by two
    warpgroups.
    """
    return 256 + 128 + 32 + 3 * rows


def pair_wavefronts(rows: int) -> int:
    """Return the wavefronts of L1 and shared memory for 2048 weights, one stage of a warp of linear_nf4_pairs.cu.

    32 lookups, 8 to write the packed bytes and 8 to read them, 8 for the constants, 8 for each 8 rows of x.
    """
    return 32 + 8 + 8 + 8 + rows


PLANNED_ROWS = (*range(1, 17), 24, 32, 48, 64)
"""Numbers of rows up to 64 for which routing.py chooses; others take the choice of the next one."""


def pair_rows(gpu: GPU) -> tuple[tuple[int, int], ...]:
    """Return the fewest and the most rows of each range in which the pair-table kernel is PAIRS_MARGIN faster than the
    others.
    """
    ranges: list[tuple[int, int]] = []
    before = 0
    for M in PLANNED_ROWS:
        others = min(fused_us(gpu, M), small_m_us(gpu, M) if max(SMALL_M) >= M else math.inf)
        if pairs_us(gpu, M) * PAIRS_MARGIN <= others:
            adjoins = bool(ranges) and ranges[-1][1] == before
            first = ranges.pop()[0] if adjoins else before + 1
            ranges.append((first, M))
        before = M
    return tuple(ranges)


ROUTING_MARGIN = 1.5
"""Factor by which the fused kernel must be faster in the model to be chosen. The model ignores reuse of the workspace
in L2, and bitsandbytes' measured bounds for a similar choice are lower than those of such models.
"""


def fused_rows(gpu: GPU) -> int:
    """Return the largest multiple of 64 rows, 64 to 512, up to which the fused kernel is ROUTING_MARGIN faster."""
    rows = 64
    while rows < 512 and fused_us(gpu, rows + 64) * ROUTING_MARGIN <= decoded_us(gpu, rows + 64):
        rows += 64
    return rows


LIBRARY_STEP = 64
"""Step of the library's products along the contraction, to which K + r is rounded up."""


def widest_extended_k(gpu: GPU) -> float:
    """Return the largest K / N, in quarters, up to which copying x is cheaper than adding the low-rank term to y.

    The copy writes 2 bytes for each element of x; the addition moves 4 for each element of y, less what one more step
    of the product costs at the same bandwidth (qlora_kernels/ops/extended_k.py).
    """
    step = 2.0 * LIBRARY_STEP * gpu.bytes_per_s / gpu.flops_per_s
    return int(4 * (4 - step) / 2) / 4


def training_us(gpu: GPU, M: int) -> dict[str, float]:
    """Return the time in microseconds of forward and backward of one LoRA linear without dropout, by implementation."""
    products = 2 * 2.0 * M * WEIGHTS / gpu.flops_per_s * 1e6
    a_pass = 2.0 * M * K / gpu.bytes_per_s * 1e6
    ours, peer = 2 * dequantize_us(gpu), 2 * dequantize_us(gpu, PEER_DEQUANTIZE, launches=3)
    return {
        "products": products,
        "by parts": products + ours + 4 * a_pass / SKINNY + 4 * a_pass / ADDMM + 12 * STEP_LAUNCH,
        "extended K": products * (1 + LIBRARY_STEP / K)
        + ours
        + 4 * a_pass / COPY
        + 2 * a_pass / SKINNY
        + 13 * STEP_LAUNCH,
        "Unsloth": products + peer + 6 * a_pass / SKINNY + 4 * a_pass / ADDMM + 14 * STEP_LAUNCH,
        "bitsandbytes + PEFT": products + peer + 4 * a_pass / SKINNY + 12 * a_pass / 0.9 + 20 * STEP_LAUNCH,
        "dense + PEFT": products + 4 * a_pass / SKINNY + 12 * a_pass / 0.9 + 18 * STEP_LAUNCH,
    }


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table with the given header cells and rows."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report() -> str:
    """Return the page with all tables of predicted times as Markdown."""
    few = (1, 4, 16, 24, 32, 48, 64, 128, 256, 512)
    forward = table(
        ("GPU", "path", *(f"M={M}" for M in few), "rows routed to it"),
        (
            row
            for gpu in GPUS.values()
            for row in (
                (
                    gpu.name,
                    "decoded inside",
                    *(f"{small_m_us(gpu, M) if M <= 4 else fused_us(gpu, M):.1f}" for M in few),
                    f"up to {fused_rows(gpu)}",
                ),
                (
                    "",
                    "pair table",
                    *(f"{pairs_us(gpu, M):.1f}" if M <= 64 else "" for M in few),
                    ", ".join(f"{fewest} to {most}" for fewest, most in pair_rows(gpu)),
                ),
                *([("", "wgmma", *(f"{wgmma_us(gpu, M):.1f}" for M in few), "on request")] if gpu is GPUS[90] else []),
                ("", "decode, product", *(f"{decoded_us(gpu, M):.1f}" for M in few), ""),
            )
        ),
    )
    kinds = list(training_us(GPUS[90], 1024))
    training = table(
        ("GPU", "M", *kinds),
        (
            (gpu.name, M, *(f"{us:.0f}" for us in training_us(gpu, M).values()))
            for gpu in GPUS.values()
            for M in (1024, 4096, 16384)
        ),
    )
    return (
        "# Predicted times of one linear layer\n\n"
        "**Predicted, not run on a GPU.** Microseconds for a weight of 4096 x 4096 in NF4, by the model in\n"
        "`bench/roofline.py`. `python -m bench.roofline --update docs/notebook/roofline.md` writes this page again.\n\n"
        f"## Forward, kernels alone\n\n{forward}\n\n"
        f"## One LoRA linear, forward and backward\n\nr = 16, no dropout.\n\n{training}\n"
    )


def main() -> None:
    """Print the page, or write it to --update FILE."""
    parser = argparse.ArgumentParser(prog="bench.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the page to this file")
    arguments = parser.parse_args()
    if arguments.update is None:
        sys.stdout.write(report())
    else:
        arguments.update.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
