"""Two-stage reductions without atomics: each program stores its fp32 partial sum, and these are added in order.

The results are therefore the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rounding import cdiv, next_power_of_2
from .launch import KEPT_LAUNCHES, Launch, Launchable, launchable
from .launch_sequence import LaunchSequence, Slot
from .planner import arch_for

BLOCK = 1024
NUM_WARPS = 4
MAX_SPLITS = 32


@launchable
@triton.jit
def sum_partials_kernel(p_parts, p_out, numel, parts, scale, BLOCK: tl.constexpr):
    """Compute out[i] = scale * (part[0, i] + part[1, i] + ...), rounded once to out's dtype; BLOCK elements per
    program.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    p_part = p_parts + o
    for _ in range(parts):
        total += tl.load(p_part, mask=o < numel, other=0.0)
        p_part += numel
    tl.store(p_out + o, (total * scale).to(p_out.dtype.element_ty), mask=o < numel)


def sum_partials(parts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return scale * parts.sum(0) in `dtype`; parts: fp32 [n, ...], contiguous."""
    n, *shape = parts.shape
    out = parts.new_empty(*shape, dtype=dtype)
    _sum_launch(sum_partials_kernel, out.numel(), n, float(scale))(parts, out)
    return out


@lru_cache(maxsize=KEPT_LAUNCHES)
def _sum_launch(kernel: Launchable, numel: int, parts: int, scale: float) -> Launch:
    return kernel.prepare((cdiv(numel, BLOCK),), (numel, parts, scale), BLOCK=BLOCK, num_warps=NUM_WARPS)


def add_summed(
    sequence: LaunchSequence,
    launch: Launch,
    pointers: Callable[[Slot], Sequence[Slot]],
    parts: int,
    shape: tuple[int, ...],
    scale: float,
    dtype: torch.dtype,
) -> Slot:
    """Add a launch that writes partial sums, and the launch that adds them; return the slot of scale * their sum.

    pointers(out): the slots of the launch, which writes fp32 [parts, *shape] to `out`, or, if there is one part, the
    result itself, scaled, of `dtype`.
    """
    if parts == 1:
        out = sequence.allocate(shape, dtype)
        sequence.add(launch, *pointers(out))
        return out
    partial_sums = sequence.allocate((parts, *shape), torch.float32)
    sequence.add(launch, *pointers(partial_sums))
    return add_sum(sequence, partial_sums, parts, shape, scale, dtype)


def add_sum(
    sequence: LaunchSequence, partial_sums: Slot, parts: int, shape: tuple[int, ...], scale: float, dtype: torch.dtype
) -> Slot:
    """Add scale * partial_sums.sum(0) to a sequence; return its slot. partial_sums: fp32 [parts, *shape]."""
    out = sequence.allocate(shape, dtype)
    sequence.add(_sum_launch(sum_partials_kernel, prod(shape), parts, float(scale)), partial_sums, out)
    return out


def split_count(steps: int, tiles: int, capability: int) -> tuple[int, int]:
    """Return (steps per split, splits) of a reduction of `steps` steps; tiles * splits fill the GPU about twice."""
    wanted = max(1, 2 * arch_for(capability).sm_count // tiles)
    per_split = max(1, cdiv(steps, min(wanted, MAX_SPLITS)))
    return per_split, cdiv(steps, per_split)


def rank_tile(r: int, dtype: torch.dtype) -> int:
    """Return the width of a tile along the rank: a power of two, at least 16, the minimum of tl.dot.

    In fp32 it is always 16, because 32 spills registers on sm_90.
    """
    return 16 if dtype == torch.float32 else min(64, max(16, next_power_of_2(r)))


def fp32_safe_step(step: int, dtype: torch.dtype) -> int:
    """Return a kernel's step along a sum over rows or columns: `step`, but 16 rows or 64 columns in fp32.

    fp32 products are FMAs whose operands for a whole step are in registers: steps of 64 rows and 256 columns took 6000
    spill instructions on sm_80.
    """
    return step if dtype != torch.float32 else 16 if step <= 64 else 64
