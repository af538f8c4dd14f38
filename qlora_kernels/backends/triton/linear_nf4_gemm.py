"""The fused matmul kernels: NF4 weights are decoded inside the main loop and never stored.

Both kernels compute the transpose of their result, so that the decoded weight is the left operand. On Hopper, wgmma
accepts the left operand in registers, where decoding leaves it, while the right operand must be in shared memory, where
cp.async puts the activations.

Both need K % blocksize == 0, so that each row starts at a byte and at a block, and each step along K has one absmax per
row. Other shapes are decoded first (linear_nf4.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import code_table, decode_pairs, load_absmax
from .dropout import keep_tile
from .launch import launchable


@launchable
@triton.jit
def linear_nf4_kernel(
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
    M,
    N,
    K,
    R,
    scaling,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute y^T = W x^T + bias + scaling * B s^T, one tile [BLOCK_N, BLOCK_M] per program.

    Grid (tiles of M * tiles of N, splits of K), M fastest, so that concurrent programs share weights in L2.
    One split: y [M, N] in x's dtype, with bias and LoRA. The accumulator starts with the LoRA product, which needs s
    [M, R] and costs R / K of the main loop.
    SPLIT: y is fp32 [splits, M, N]; each program stores its partial sum over K. lora_up_kernel adds the partial sums in
    order, then bias and LoRA, without atomics, so that the bits are the same in every run.
    The constants of the next step are loaded one step ahead: with double quantization they need two dependent loads,
    which are too narrow for cp.async.
    Assumes K % BLOCKSIZE == 0 and BLOCKSIZE % BLOCK_K == 0. Launch with enable_fp_fusion=False.
    """
    HALF_K: tl.constexpr = BLOCK_K // 2
    tiles_m = tl.cdiv(M, BLOCK_M)
    i_m = tl.program_id(0) % tiles_m
    i_n = tl.program_id(0) // tiles_m
    i_split = tl.program_id(1)
    steps = tl.cdiv(K // BLOCK_K, tl.num_programs(1))
    first = i_split * steps
    last = min(first + steps, K // BLOCK_K)

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the end read row 0 without a mask; their results are not stored.
    row_n = tl.where(o_n < N, o_n, 0).to(tl.int64)
    row_m = tl.where(o_m < M, o_m, 0).to(tl.int64)
    row_block = row_n * (K // BLOCKSIZE)
    # Offsets in blocks show the compiler that rows start at multiples of 16 bytes; K // 2 would only show 8.
    p_weights = p_packed + row_block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, HALF_K)[None, :]
    p_activations = p_x + row_m[None, :] * K + tl.arange(0, BLOCK_K)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if HAS_LORA and not SPLIT:
        for i_r in range(0, R, BLOCK_R):
            o_r = i_r + tl.arange(0, BLOCK_R)
            b_B = tl.load(p_lora_B + row_n[:, None] * R + o_r[None, :], mask=o_r[None, :] < R, other=0.0)
            b_s = tl.load(p_s + row_m[None, :] * R + o_r[:, None], mask=o_r[:, None] < R, other=0.0)
            acc = tl.dot(b_B.to(b_s.dtype), b_s, acc, input_precision="ieee")
        acc *= scaling

    table = code_table()
    b_absmax = load_absmax(
        p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset,
        row_block + first * BLOCK_K // BLOCKSIZE, first < last, DOUBLE_QUANT,
    )  # fmt: skip
    for i in range(first, last):
        b_packed = tl.load(p_weights + i * HALF_K)  # [BLOCK_N, HALF_K]
        b_x = tl.load(p_activations + i * BLOCK_K)  # [BLOCK_K, BLOCK_M]
        next_absmax = load_absmax(
            p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset,
            row_block + (i + 1) * BLOCK_K // BLOCKSIZE, i + 1 < last, DOUBLE_QUANT,
        )  # fmt: skip
        high, low = decode_pairs(b_packed, table)
        pairs = tl.join(high * b_absmax[:, None], low * b_absmax[:, None]).to(b_x.dtype)
        acc = tl.dot(tl.reshape(pairs, (BLOCK_N, BLOCK_K)), b_x, acc, input_precision="ieee")
        b_absmax = next_absmax

    m_y = (o_n[:, None] < N) & (o_m[None, :] < M)
    o_y = o_m[None, :].to(tl.int64) * N + o_n[:, None]
    if not SPLIT:
        if HAS_BIAS:
            acc += tl.load(p_bias + row_n).to(tl.float32)[:, None]
        tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), mask=m_y)
    else:
        tl.store(p_y + i_split.to(tl.int64) * M * N + o_y, acc, mask=m_y)


@launchable
@triton.jit
def linear_nf4_grad_x_kernel(
    p_grad_y,
    p_packed,
    p_stored_absmax,
    p_absmax_map,
    p_absmax_scale,
    p_absmax_offset,
    p_ds,
    p_lora_A,
    p_seed,
    p_grad_x,
    M,
    N,
    K,
    R,
    keep_scale,
    threshold,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    HAS_LORA: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute grad_x^T = W^T grad_y^T + keep_scale * keep * (A^T ds^T), one tile [BLOCK_K, BLOCK_M] per program.

    The sum runs over N. The packed bytes are row-major as in forward; a tile [BLOCK_N, BLOCK_K] is decoded and
    transposed before the matmul. Grid (tiles of M * tiles of K, splits of N), M fastest. SPLIT, the partial sums and
    the LoRA start of the accumulator are as in linear_nf4_kernel. keep is the forward dropout mask. Assumes K %
    BLOCKSIZE == 0 and BLOCKSIZE % BLOCK_K == 0, so that a row of the tile has one absmax. Launch with
    enable_fp_fusion=False.
    """
    HALF_K: tl.constexpr = BLOCK_K // 2
    tiles_m = tl.cdiv(M, BLOCK_M)
    i_m = tl.program_id(0) % tiles_m
    i_k = tl.program_id(0) // tiles_m
    i_split = tl.program_id(1)
    steps = tl.cdiv(tl.cdiv(N, BLOCK_N), tl.num_programs(1))
    first = i_split * steps
    last = min(first + steps, tl.cdiv(N, BLOCK_N))

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row_m = tl.where(o_m < M, o_m, 0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    o_half = i_k * HALF_K + tl.arange(0, HALF_K)
    i_block = i_k * BLOCK_K // BLOCKSIZE

    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    if HAS_LORA and not SPLIT:
        for i_r in range(0, R, BLOCK_R):
            o_r = i_r + tl.arange(0, BLOCK_R)
            b_A = tl.load(p_lora_A + o_r[None, :].to(tl.int64) * K + o_k[:, None], mask=o_r[None, :] < R, other=0.0)
            b_ds = tl.load(p_ds + row_m[None, :] * R + o_r[:, None], mask=o_r[:, None] < R, other=0.0)
            acc = tl.dot(b_A.to(b_ds.dtype), b_ds, acc, input_precision="ieee")
        if DROPOUT:
            keep = keep_tile(tl.load(p_seed), threshold, i_m * BLOCK_M, i_k * BLOCK_K, K, DROPOUT, BLOCK_M, BLOCK_K)
            acc = tl.where(tl.trans(keep), acc * keep_scale, 0.0)

    table = code_table()
    row_n = tl.minimum(first * BLOCK_N + o_n, N - 1).to(tl.int64)
    b_absmax = load_absmax(
        p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset,
        row_n * (K // BLOCKSIZE) + i_block, first < last, DOUBLE_QUANT,
    )  # fmt: skip
    for i in range(first, last):
        column = i * BLOCK_N + o_n
        # Weight rows beyond N read the last row, and their grad_y is zero.
        row_block = tl.minimum(column, N - 1).to(tl.int64) * (K // BLOCKSIZE)
        b_packed = tl.load(p_packed + row_block[:, None] * (BLOCKSIZE // 2) + o_half[None, :])  # [BLOCK_N, HALF_K]
        b_grad = tl.load(p_grad_y + row_m[None, :] * N + column[:, None], mask=column[:, None] < N, other=0.0)
        next_n = tl.minimum(column + BLOCK_N, N - 1).to(tl.int64)
        next_absmax = load_absmax(
            p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset,
            next_n * (K // BLOCKSIZE) + i_block, i + 1 < last, DOUBLE_QUANT,
        )  # fmt: skip
        high, low = decode_pairs(b_packed, table)
        pairs = tl.join(high * b_absmax[:, None], low * b_absmax[:, None]).to(b_grad.dtype)
        b_w = tl.reshape(pairs, (BLOCK_N, BLOCK_K))
        acc = tl.dot(tl.trans(b_w), b_grad, acc, input_precision="ieee")
        b_absmax = next_absmax

    m_out = (o_k[:, None] < K) & (o_m[None, :] < M)
    o_out = o_m[None, :].to(tl.int64) * K + o_k[:, None]
    if not SPLIT:
        tl.store(p_grad_x + o_out, acc.to(p_grad_x.dtype.element_ty), mask=m_out)
    else:
        tl.store(p_grad_x + i_split.to(tl.int64) * M * K + o_out, acc, mask=m_out)
