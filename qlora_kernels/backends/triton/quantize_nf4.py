"""Quantization of weights to packed indices and absmax, in one launch, bit-equal to format/reference.py."""

from __future__ import annotations

import struct
from functools import cache
from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...format import nf4
from ...rounding import cdiv
from .decode import INTERPRETED
from .launch import launchable

NUM_WARPS = 4
PROGRAM_VALUES = 4096

SMALLEST_ABSMAX = tl.constexpr(nf4.SMALLEST_ABSMAX)
BOUNDARIES = tl.constexpr(tuple(nf4.boundaries("cpu").tolist()))

CELL_SCALE, CELL_ORIGIN, CELLS = 15.0, 16.0, 32


def cell_of(x: float) -> int:
    """Return the cell of a normalized weight, 1..31: x * CELL_SCALE + CELL_ORIGIN rounded to nearest, ties to even.

    It is monotonic in x, and cells are narrower than the least distance between boundaries, so no cell has two of them.
    """
    return round(x * CELL_SCALE + CELL_ORIGIN)


def cell_table() -> tuple[list[float], list[int]]:
    """Return, for each cell, its boundary (+inf if none) and the number of boundaries in the cells below."""
    boundaries = nf4.boundaries("cpu").tolist()
    inside = [next((b for b in boundaries if cell_of(b) == c), inf) for c in range(CELLS)]
    return inside, [sum(cell_of(b) < c for b in boundaries) for c in range(CELLS)]


@cache
def cells(device: torch.device) -> Tensor:
    """Return `cell_table` as int32 [64]: the bits of the boundaries, then the counts."""
    boundaries, counts = cell_table()
    bits = struct.unpack(f"{CELLS}i", struct.pack(f"{CELLS}f", *boundaries))
    return torch.tensor([*bits, *counts], dtype=torch.int32, device=device)


# Adding 2^23 to a number below 2^22 rounds it to an integer in the low bits. The sum's bits can be used as a shuffle's
# source lane, because only the low five bits count.
_MAGIC = struct.unpack(">I", struct.pack(">f", 2.0**23 + CELL_ORIGIN))[0]
_SCALE = struct.unpack(">I", struct.pack(">f", CELL_SCALE))[0]
LANE_CELL_ASM = tl.constexpr(
    """{
.reg .b32 lane; .reg .b64 address;
mov.u32 lane, %laneid;
mul.wide.u32 address, lane, 4;
add.s64 address, address, $2;
ld.global.nc.b32 $0, [address];
ld.global.nc.b32 $1, [address + 128];
}"""
)
ENCODE_ASM = tl.constexpr(
    f"""{{
.reg .f32 cell, boundary; .reg .b32 lane; .reg .pred above;
fma.rn.f32 cell, $1, 0f{_SCALE:08X}, 0f{_MAGIC:08X};
mov.b32 lane, cell;
shfl.sync.idx.b32 boundary, $2, lane, 0x1f, 0xffffffff;
shfl.sync.idx.b32 $0, $3, lane, 0x1f, 0xffffffff;
setp.gt.f32 above, $1, boundary;
@above add.s32 $0, $0, 1;
}}"""
)


@triton.jit
def encode(x, p_cells):
    """Return the number of decision boundaries strictly below x, int32 in 0..15, for |x| <= 1 (or an ulp more).

    On a GPU, lane c of every warp holds the boundary and count of cell c, and each value fetches both by two shuffles:
    about six instructions. Comparing with 15 boundaries takes 30, a tree of selects 19 and many registers. The
    interpreter uses the tree.
    """
    if INTERPRETED:
        b3 = x > BOUNDARIES[7]
        b2 = x > tl.where(b3, BOUNDARIES[11], BOUNDARIES[3])
        b1 = x > tl.where(b3, tl.where(b2, BOUNDARIES[13], BOUNDARIES[9]), tl.where(b2, BOUNDARIES[5], BOUNDARIES[1]))
        high_12, high_8 = tl.where(b1, BOUNDARIES[14], BOUNDARIES[12]), tl.where(b1, BOUNDARIES[10], BOUNDARIES[8])
        low_4, low_0 = tl.where(b1, BOUNDARIES[6], BOUNDARIES[4]), tl.where(b1, BOUNDARIES[2], BOUNDARIES[0])
        b0 = x > tl.where(b3, tl.where(b2, high_12, high_8), tl.where(b2, low_4, low_0))
        return b3.to(tl.int32) * 8 + b2.to(tl.int32) * 4 + b1.to(tl.int32) * 2 + b0.to(tl.int32)
    else:
        boundary, count = tl.inline_asm_elementwise(
            LANE_CELL_ASM, "=f,=r,l", [p_cells], dtype=(tl.float32, tl.int32), is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            ENCODE_ASM, "=&r,f,f,r", [x, boundary, count], dtype=tl.int32, is_pure=True, pack=1
        )


@launchable
@triton.jit
def quantize_nf4_kernel(
    p_w, p_cells, p_packed, p_absmax, numel, n_bytes, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """Quantize BLOCKS whole blocks per program, a tile [BLOCKS, BLOCKSIZE] of the flattened weight.

    absmax = max|w| in fp32, or 0 below the smallest normal number; q = encode(w * fp32(1 / absmax)), with the
    reciprocal and the product each rounded to fp32 (IEEE division, not the approximate one). Elements beyond numel and
    blocks with absmax 0 encode 0, whose index also pads the low nibble of an odd tail.
    """
    i_first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE)
    p_w += i_first
    # Uses n_bytes and not numel // 2, so that the compiler derives 16-byte alignment of the mask, and 16-byte stores.
    i_byte = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE // 2)
    p_packed += i_byte
    p_absmax += tl.program_id(0).to(tl.int64) * BLOCKS
    values_left = numel - i_first

    o_block = tl.arange(0, BLOCKS)
    o_value = o_block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    b_w = tl.load(p_w + o_value, mask=o_value < values_left, other=0.0).to(tl.float32)
    # Without the sign bit, floats order like their bits, and NaN is the largest. The integer maximum thus keeps NaN,
    # which the public function detects; a float maximum would drop it.
    magnitude = b_w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_absmax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    b_absmax = tl.where(b_absmax < SMALLEST_ABSMAX, 0.0, b_absmax)
    divisor = tl.where(b_absmax == 0.0, 1.0, b_absmax)
    inverse = tl.where(b_absmax == 0.0, 0.0, tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor))
    q = encode(b_w * inverse[:, None], p_cells)

    high, low = tl.split(tl.reshape(q, (BLOCKS, BLOCKSIZE // 2, 2)))
    o_byte = o_block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(p_packed + o_byte, (high * 16 + low).to(tl.uint8), mask=o_byte < n_bytes - i_byte)
    tl.store(p_absmax + o_block, b_absmax, mask=o_block * BLOCKSIZE < values_left)


def quantize_nf4(w: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return (packed, absmax) of contiguous w. See ops/quantize_nf4.py for the contract."""
    numel = w.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(cdiv(numel, blocksize), dtype=torch.float32, device=w.device)
    quantize_nf4_kernel[(cdiv(numel, PROGRAM_VALUES),)](
        w,
        cells(w.device),
        packed,
        absmax,
        numel,
        packed.numel(),
        BLOCKSIZE=blocksize,
        BLOCKS=PROGRAM_VALUES // blocksize,
        num_warps=NUM_WARPS,
    )
    return packed, absmax
