"""Dequantization, w[i] = code[q[i]] * absmax[i // blocksize], in one launch, bit-equal to format/reference.py."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ...ops.operands import Weight
from ...rounding import cdiv
from .constants import absmax_pointers
from .decode import code_table, decode_pairs
from .launch import KEPT_LAUNCHES, Launch, Launchable, launchable
from .planner import decoded_row

NUM_WARPS = 4
TILE_BYTES = 4 * 32 * NUM_WARPS
"""Packed bytes per thread: four give eight 16-bit values, one 16-byte store without exchange between threads."""

PROGRAM_VALUES = 16384
"""Tiles per program; 16 amortize the setup of the code table. At blocksize 64 a program covers one nested block."""


@launchable
@triton.jit
def dequantize_nf4_kernel(
    p_packed,
    p_stored_absmax,
    p_absmax_map,
    p_absmax_scale,
    p_absmax_offset,
    p_w,
    numel,
    n_blocks,
    K,
    gap,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    STRIDED: tl.constexpr,
    LONG_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILES: tl.constexpr,
):
    """Decode TILES tiles of ROWS x ROW_BYTES packed bytes per program, a contiguous range of weights.

    A row is inside one block, so its absmax is loaded once; the product is fp32, rounded once to w's dtype. A program's
    range is inside one nested block (TILES * ROWS * 2 * ROW_BYTES <= 256 * BLOCKSIZE, both powers of two), so its
    second-level scale is a scalar.
    SHORT_TAIL: numel is not a multiple of a program's range. Then only the last program masks its accesses; the other
    programs run a body without masks, whose offsets fold into immediates of one 64-bit base.
    STRIDED: w is [N, K] with `gap` elements between its rows, for K a multiple of a tile's row. The column of a tile's
    first weight is carried from tile to tile. LONG_ROWS: a tile is no longer than a row of w, so that at most one row
    ends inside it, and no division is needed.
    Launch with enable_fp_fusion=False: map * scale + offset takes two roundings.
    """
    RUN: tl.constexpr = TILES * ROWS * 2 * ROW_BYTES
    i_first = tl.program_id(0).to(tl.int64) * RUN
    i_block = tl.program_id(0).to(tl.int64) * (RUN // BLOCKSIZE)
    p_packed += i_first // 2
    p_w += i_first
    column = 0
    if STRIDED:
        # In rows of a tile, of which a row of w is a multiple: 32 bits suffice.
        i_row = tl.program_id(0) * (RUN // (2 * ROW_BYTES))
        rows_of_w = K // (2 * ROW_BYTES)
        p_w += (i_row // rows_of_w).to(tl.int64) * gap
        column = i_row % rows_of_w * (2 * ROW_BYTES)  # of the program's first weight
    p_stored_absmax += i_block
    scale = 0.0
    offset = 0.0
    if DOUBLE_QUANT:
        scale = tl.load(p_absmax_scale + i_block // 256)
        offset = tl.load(p_absmax_offset)
    table = code_table()
    if SHORT_TAIL:
        values_left = numel - i_first
        if values_left < RUN:
            decode_run(
                p_packed, p_stored_absmax, p_absmax_map, scale, offset, p_w, values_left, n_blocks - i_block, table,
                column, K, gap, BLOCKSIZE, DOUBLE_QUANT, True, STRIDED, LONG_ROWS, ROWS, ROW_BYTES, TILES,
            )  # fmt: skip
            return
    decode_run(
        p_packed, p_stored_absmax, p_absmax_map, scale, offset, p_w, 0, 0, table,
        column, K, gap, BLOCKSIZE, DOUBLE_QUANT, False, STRIDED, LONG_ROWS, ROWS, ROW_BYTES, TILES,
    )  # fmt: skip


@triton.jit
def decode_run(
    p_packed,
    p_stored_absmax,
    p_absmax_map,
    scale,
    offset,
    p_w,
    values_left,
    blocks_left,
    table,
    column,
    K,
    gap,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
    LONG_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILES: tl.constexpr,
):
    """Decode one program's range, at whose start the pointers are. MASKED: only values_left and blocks_left exist.

    STRIDED: the range starts at `column` of a row of w.
    """
    ROW_VALUES: tl.constexpr = 2 * ROW_BYTES
    o_row = tl.arange(0, ROWS)
    o_byte = o_row[:, None] * ROW_BYTES + tl.arange(0, ROW_BYTES)[None, :]
    o_value = o_row[:, None] * ROW_VALUES + tl.arange(0, ROW_VALUES)[None, :]
    for i in tl.static_range(TILES):
        i_value = i * ROWS * ROW_VALUES
        o_block = (i_value + o_row * ROW_VALUES) // BLOCKSIZE
        if MASKED:
            b_packed = tl.load(p_packed + (i_value // 2 + o_byte), mask=i_value + 2 * o_byte < values_left, other=0)
            b_absmax = tl.load(p_stored_absmax + o_block, mask=o_block < blocks_left, other=0)
        else:
            b_packed = tl.load(p_packed + (i_value // 2 + o_byte))
            b_absmax = tl.load(p_stored_absmax + o_block)
        if DOUBLE_QUANT:
            b_absmax = tl.load(p_absmax_map + b_absmax.to(tl.int32)) * scale + offset
        high, low = decode_pairs(b_packed, table)
        pairs = tl.join(high * b_absmax[:, None], low * b_absmax[:, None])
        b_w = tl.reshape(pairs, (ROWS, ROW_VALUES)).to(p_w.dtype.element_ty)
        p_tile = p_w + (i_value + o_value)
        if STRIDED:
            o_column = column + o_row * ROW_VALUES
            column += ROWS * ROW_VALUES
            if LONG_ROWS:
                # A choice between two pointers: Triton 3.8 finds no alignment in a choice between gap and 0, and then
                # stores two bytes at a time.
                p_tile = tl.where((o_column >= K)[:, None], p_tile + gap, p_tile)
                p_w += tl.where(column >= K, gap, 0)
                column -= tl.where(column >= K, K, 0)
            else:
                p_tile += ((o_column // K).to(tl.int64) * gap)[:, None]
                p_w += (column // K).to(tl.int64) * gap
                column %= K
        if MASKED:
            tl.store(p_tile, b_w, mask=i_value + o_value < values_left)
        else:
            tl.store(p_tile, b_w)


def dequantize_nf4(weight: Weight, *, out: Tensor) -> None:
    """Write code[q[i]] * absmax[i // blocksize] into out. See ops/dequantize_nf4.py for the contract.

    out may also be [N, K] with a stride between its rows, if K is a multiple of `decoded_row(weight.blocksize)`.
    """
    pointers = absmax_pointers(weight)
    strided = not out.is_contiguous()
    assert not strided or out.shape[1] % decoded_row(weight.blocksize) == 0
    launch = _launch(
        dequantize_nf4_kernel,
        out.numel(),
        pointers.stored_absmax.numel(),
        out.shape[-1],
        out.stride(0) - out.shape[1] if strided else None,
        weight.blocksize,
        weight.double_quant,
    )
    launch(weight.packed, *pointers, out)


@lru_cache(maxsize=KEPT_LAUNCHES)
def _launch(
    kernel: Launchable, numel: int, blocks: int, columns: int, gap: int | None, blocksize: int, double_quant: bool
) -> Launch:
    """Return the launch. columns: of out.   gap: elements between its rows, None if it is contiguous."""
    row_values = decoded_row(blocksize)
    program_values = min(PROGRAM_VALUES, 256 * blocksize)
    return kernel.prepare(
        (cdiv(numel, program_values),),
        (numel, blocks, columns, gap or 0),
        BLOCKSIZE=blocksize,
        DOUBLE_QUANT=double_quant,
        SHORT_TAIL=numel % program_values != 0,
        STRIDED=gap is not None,
        LONG_ROWS=columns >= 2 * TILE_BYTES,
        ROWS=2 * TILE_BYTES // row_values,
        ROW_BYTES=row_values // 2,
        TILES=program_values // (2 * TILE_BYTES),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
