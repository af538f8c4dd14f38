"""Device functions shared by the NF4 kernels: decoding of packed bytes, and loading of absmax.

The 16 code values are in the registers of a warp: lane l holds code[l % 16], and decoding is one shuffle whose source
lane is the 4-bit index. This costs one shift and one shuffle per weight. It needs no table in shared memory, has no
bank conflicts and does not change the layout, so the compiler may decode directly into a matmul's register operand. The
whole dequantize kernel takes 4.2..5.5 SASS instructions per weight (docs/kernels/summary.md); a tree of selects took
17, tl.gather 8.

The interpreter does not support inline PTX, so `INTERPRETED` selects an equivalent in plain Triton.
"""

from __future__ import annotations

import os
import struct

import triton
import triton.language as tl

from ...format.nf4 import CODE

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
CODE_VALUES = tl.constexpr(CODE)


def _lane_code_asm() -> str:
    """Return PTX for $0 = code[lane % 16], by a four-level tree of selects over the bits of the lane number."""
    words = [f"0f{struct.unpack('>I', struct.pack('>f', value))[0]:08X}" for value in CODE]
    lines = ["mov.u32 lane, %laneid;"]
    lines += [f"and.b32 bit, lane, {1 << b}; setp.ne.u32 p{b}, bit, 0;" for b in range(4)]
    names = words
    for level in range(4):
        results = [f"v{level}_{i}" if level < 3 else "$0" for i in range(len(names) // 2)]
        lines += [f"selp.f32 {out}, {names[2 * i + 1]}, {names[2 * i]}, p{level};" for i, out in enumerate(results)]
        names = results
    registers = ", ".join(f"v{level}_{i}" for level in range(3) for i in range(8 >> level))
    declarations = f".reg .b32 lane, bit; .reg .pred p0, p1, p2, p3; .reg .f32 {registers};"
    return "{\n" + declarations + "\n" + "\n".join(lines) + "\n}"


def _decode_asm() -> str:
    """Return PTX for four bytes in $8: $0..3 = code[high nibble], $4..7 = code[low nibble]; $9 is this lane's code.

    The shuffle reduces source lanes modulo 16: clamp 0x101f splits the warp into halves of 16 lanes, and only the low
    bits of the index count. A nibble therefore needs a shift but no mask.
    """
    lines = []
    for byte in range(4):
        for output, shift in ((byte, 8 * byte + 4), (4 + byte, 8 * byte)):
            lines.append(f"shr.u32 q, $8, {shift};")
            lines.append(f"shfl.sync.idx.b32 ${output}, $9, q, 0x101f, 0xffffffff;")
    return "{\n.reg .b32 q;\n" + "\n".join(lines) + "\n}"


LANE_CODE_ASM = tl.constexpr(_lane_code_asm())
DECODE_ASM = tl.constexpr(_decode_asm())
DECODE_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 8 + ["r"] + ["f"] * 4))
DECODE_WORD_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 8 + ["r", "f"]))


@triton.jit
def code_table():
    """Return the table for `decode_pairs`: one scalar per lane on a GPU, a tensor [16] in the interpreter."""
    if INTERPRETED:
        o_code = tl.arange(0, 16)
        table = tl.zeros((16,), tl.float32)
        for i in tl.static_range(16):
            table = tl.where(o_code == i, CODE_VALUES[i], table)
        return table
    else:
        return tl.inline_asm_elementwise(LANE_CODE_ASM, "=f,r", [0], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def decode_pairs(b_packed, table):
    """Decode uint8 to (code[high nibble], code[low nibble]), fp32 of the same shape: even and odd elements.

    All lanes of the warp must take part, so it must not be called in divergent branches. The tensor must give each
    thread at least four bytes.
    """
    if INTERPRETED:
        flat = tl.reshape(b_packed, (b_packed.numel,)).to(tl.int32)
        high = tl.reshape(tl.gather(table, flat >> 4, 0), b_packed.shape)
        low = tl.reshape(tl.gather(table, flat & 15, 0), b_packed.shape)
        return high, low
    else:
        return tl.inline_asm_elementwise(
            DECODE_ASM, DECODE_CONSTRAINTS, [b_packed, table], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )


@triton.jit
def decode_words(b_words, table):
    """Decode int32 to eight fp32 tensors of its shape: the values of a word's eight weights, in order.

    All lanes of the warp must take part, as for decode_pairs. Words stay whole registers when a loop carries them,
    while a carried uint8 tensor is unpacked and packed again in each step.
    """
    if INTERPRETED:
        flat = tl.reshape(b_words, (b_words.numel,))
        values = ()
        for i in tl.static_range(8):
            # Element 2b is the high nibble of byte b, element 2b + 1 the low one.
            index = (flat >> (8 * (i // 2) + 4 * (1 - i % 2))) & 15
            values += (tl.reshape(tl.gather(table, index, 0), b_words.shape),)
        return values
    else:
        w0, w2, w4, w6, w1, w3, w5, w7 = tl.inline_asm_elementwise(
            DECODE_ASM, DECODE_WORD_CONSTRAINTS, [b_words, table], dtype=(tl.float32,) * 8, is_pure=True, pack=1
        )
        return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def load_absmax(
    p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset, o_block, m_block, DOUBLE_QUANT: tl.constexpr
):
    """Load the first-level constants of blocks `o_block` (int64) as fp32; 0 where masked off.

    DOUBLE_QUANT: p_stored_absmax points to absmax_q (uint8), and the result is map[q] * scale[block // 256] + offset
    with two roundings, so the kernel must be launched with enable_fp_fusion=False. Otherwise it is absmax (fp32).
    """
    if DOUBLE_QUANT:
        q = tl.load(p_stored_absmax + o_block, mask=m_block, other=0).to(tl.int32)
        scale = tl.load(p_absmax_scale + o_block // 256, mask=m_block, other=0.0)
        return tl.load(p_absmax_map + q) * scale + tl.load(p_absmax_offset)
    else:
        return tl.load(p_stored_absmax + o_block, mask=m_block, other=0.0)
