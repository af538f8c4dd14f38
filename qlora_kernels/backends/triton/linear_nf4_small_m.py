"""y = x W^T for one or two rows without tensor cores: fp32 products, bound by reading the packed weight.

tl.dot multiplies at least 16 rows; with one row, decoding and fragment layouts would be nearly all of its work. Here a
warp decodes its rows of W directly into FMAs. docs/kernels/triton.md compares the instructions per weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import code_table, decode_words, load_absmax
from .launch import launchable

RUN = tl.constexpr(32)
"""Weights per lane in one 16-byte load, all in one block: blocksize is at least 32 and divides K."""


@launchable
@triton.jit
def linear_nf4_small_m_kernel(
    p_x,
    p_packed,
    p_stored_absmax,
    p_absmax_map,
    p_absmax_scale,
    p_absmax_offset,
    p_bias,
    p_s,
    p_lora_B,
    p_y,
    N,
    K,
    R,
    scaling,
    M: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[m, n] = sum_k x[m, k] w[n, k] + bias[n] + scaling * sum_j s[m, j] B[n, j], BLOCK_N values of n per program.

    Grid (tiles of N, splits of K). Each lane sums its own parts of K; the lanes are added once at the end. W is used as
    code values: absmax multiplies the sum of each run of RUN weights, so that w is not rounded to x's dtype, and all
    sums are fp32.
    SPLIT: y is fp32 [splits, M, N], partial sums that lora_up_kernel adds in order, then bias and LoRA.
    The packed words and constants of the next step are loaded one step ahead.
    Assumes K % BLOCKSIZE == 0 and 4-byte alignment of p_packed. Launch with enable_fp_fusion=False.
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    RUNS: tl.constexpr = BLOCK_K // RUN
    i_split = tl.program_id(1)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1))
    first = i_split * steps
    last = min(first + steps, tl.cdiv(K, BLOCK_K))
    blocks = K // BLOCKSIZE

    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    row_n = tl.where(o_n < N, o_n, 0).to(tl.int64)
    row_block = row_n * blocks
    # Offsets in blocks show the compiler 16-byte alignment; K // 8 words would not.
    o_words = row_block[:, None] * (BLOCKSIZE // 8) + tl.arange(0, WORDS)[None, :]
    p_words = p_packed.to(tl.pointer_type(tl.int32)) + o_words

    table = code_table()
    sums = (tl.zeros((BLOCK_N, RUNS), tl.float32),) * M
    next_words, next_absmax = load_step(
        p_words, p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset, row_block, first,
        tl.where(first < last, blocks, 0), BLOCKSIZE, DOUBLE_QUANT, BLOCK_K,
    )  # fmt: skip
    for i in range(first, last):
        b_words, b_absmax = next_words, next_absmax
        next_words, next_absmax = load_step(
            p_words, p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset, row_block, i + 1,
            tl.where(i + 1 < last, blocks, 0), BLOCKSIZE, DOUBLE_QUANT, BLOCK_K,
        )  # fmt: skip
        w = decode_words(b_words, table)
        m_k = i * BLOCK_K // BLOCKSIZE + o_k // BLOCKSIZE < blocks
        longer = ()
        for m in tl.static_range(M):
            x = split_words(tl.load(p_x + m * K + i * BLOCK_K + o_k, mask=m_k, other=0.0).to(tl.float32), WORDS)
            words = w[0] * x[0][None, :]
            for j in tl.static_range(1, 8):
                words = tl.fma(w[j], x[j][None, :], words)
            runs = tl.sum(tl.reshape(words, (BLOCK_N, RUNS, RUN // 8)), axis=2)
            longer += (tl.fma(runs, b_absmax, sums[m]),)  # type: ignore[assignment]
        sums = longer

    m_n = o_n < N
    for m in tl.static_range(M):
        y = tl.sum(sums[m], axis=1)
        if SPLIT:
            tl.store(p_y + (i_split.to(tl.int64) * M + m) * N + o_n, y, mask=m_n)
        else:
            if HAS_LORA:
                low_rank = tl.zeros((BLOCK_N,), tl.float32)
                for i_r in range(0, R, BLOCK_R):
                    o_r = i_r + tl.arange(0, BLOCK_R)
                    b_B = tl.load(p_lora_B + row_n[:, None] * R + o_r[None, :], mask=o_r[None, :] < R, other=0.0)
                    b_s = tl.load(p_s + m * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
                    low_rank += tl.sum(b_B.to(tl.float32) * b_s[None, :], axis=1)
                y += low_rank * scaling
            if HAS_BIAS:
                y += tl.load(p_bias + row_n).to(tl.float32)
            tl.store(p_y + m * N + o_n, y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def load_step(
    p_words,
    p_stored_absmax,
    p_absmax_map,
    p_absmax_scale,
    p_absmax_offset,
    row_block,
    i,
    blocks,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load step i of the rows: words int32 [BLOCK_N, BLOCK_K // 8], each run's absmax fp32 [BLOCK_N, BLOCK_K // RUN].

    blocks: number of blocks in a row; words beyond them are zero.
    """
    first = i * BLOCK_K // BLOCKSIZE
    m_word = first + tl.arange(0, BLOCK_K // 8) // (BLOCKSIZE // 8) < blocks
    b_words = tl.load(p_words + i * (BLOCK_K // 8), mask=m_word[None, :], other=0)
    o_block = first + tl.arange(0, BLOCK_K // RUN) * RUN // BLOCKSIZE
    b_absmax = load_absmax(
        p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset,
        row_block[:, None] + o_block[None, :], o_block[None, :] < blocks, DOUBLE_QUANT,
    )  # fmt: skip
    return b_words, b_absmax


@triton.jit
def split_words(b_x, WORDS: tl.constexpr):
    """Split [8 * WORDS] into eight tensors [WORDS]: result j holds elements j, 8 + j, 16 + j, ..."""
    even, odd = tl.split(tl.reshape(b_x, (WORDS, 2, 2, 2)))
    even0, even2 = tl.split(even)
    odd1, odd3 = tl.split(odd)
    x0, x4 = tl.split(even0)
    x1, x5 = tl.split(odd1)
    x2, x6 = tl.split(even2)
    x3, x7 = tl.split(odd3)
    return x0, x1, x2, x3, x4, x5, x6, x7
