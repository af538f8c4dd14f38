"""linear_nf4_lora_merged and its backward: the update is added to the weight in the registers of its decoder.

forward    W' into a workspace (merge_lora_kernel);  y = x W'^T + bias by torch's matmul
backward   s = x A^T;  ds, grad_B from one pass over grad_y;  grad_A from one pass over x;  W' again,
           grad_x = grad_y W'

Where the plan decodes inside the product, which happens for few rows, the update stays apart (linear_nf4_lora).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...ops import composed_merged_lora
from ...ops.operands import LoRA, Needs, Weight
from ...rounding import cdiv
from .constants import absmax_pointers
from .decode import code_table, decode_pairs, load_absmax
from .dequantize_nf4 import dequantize_nf4
from .dropout import dropout_of
from .launch import launchable
from .linear_nf4 import plan_for
from .linear_nf4_lora import linear_nf4_lora, linear_nf4_lora_backward
from .lora_down import lora_down
from .partials import rank_tile

BLOCK_N, BLOCK_K = 128, 64
NUM_WARPS = 8


@launchable
@triton.jit
def merge_lora_kernel(
    p_packed,
    p_stored_absmax,
    p_absmax_map,
    p_absmax_scale,
    p_absmax_offset,
    p_lora_A,
    p_lora_B,
    p_w,
    N,
    K,
    R,
    scaling,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute w[n, k] = code * absmax + scaling * sum over r of B[n, r] * A[r, k] in fp32, rounded once to w's dtype.

    One tile [BLOCK_N, BLOCK_K] per program, grid (tiles of K, tiles of N). A and B are used in w's dtype. Assumes
    K % BLOCKSIZE == 0 and BLOCKSIZE % BLOCK_K == 0, so that a row of the tile has one absmax. Launch with
    enable_fp_fusion=False.
    """
    HALF_K: tl.constexpr = BLOCK_K // 2
    i_k, i_n = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row_n = tl.where(o_n < N, o_n, 0).to(tl.int64)
    row_block = row_n * (K // BLOCKSIZE)
    o_half = i_k * HALF_K + tl.arange(0, HALF_K)
    b_packed = tl.load(p_packed + row_block[:, None] * (BLOCKSIZE // 2) + o_half[None, :])
    b_absmax = load_absmax(
        p_stored_absmax, p_absmax_map, p_absmax_scale, p_absmax_offset,
        row_block + i_k * BLOCK_K // BLOCKSIZE, o_n < N, DOUBLE_QUANT,
    )  # fmt: skip
    update = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i_r in range(0, R, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        b_B = tl.load(p_lora_B + row_n[:, None] * R + o_r[None, :], mask=o_r[None, :] < R, other=0.0)
        b_A = tl.load(p_lora_A + o_r[:, None].to(tl.int64) * K + o_k[None, :], mask=o_r[:, None] < R, other=0.0)
        b_B, b_A = b_B.to(p_w.dtype.element_ty), b_A.to(p_w.dtype.element_ty)
        update = tl.dot(b_B, b_A, update, input_precision="ieee")
    high, low = decode_pairs(b_packed, code_table())
    b_w = tl.reshape(tl.join(high * b_absmax[:, None], low * b_absmax[:, None]), (BLOCK_N, BLOCK_K))
    b_w = (b_w + update * scaling).to(p_w.dtype.element_ty)
    tl.store(p_w + row_n[:, None] * K + o_k[None, :], b_w, mask=o_n[:, None] < N)


def merge_lora(weight: Weight, lora: LoRA, out: Tensor) -> None:
    """Write W + scaling * B A to out [N, K], with one rounding to its dtype; the factors are contiguous."""
    N, K = weight.N, weight.K
    if K % weight.blocksize:
        _merge_by_torch(weight, lora, out)
        return
    block_k = min(BLOCK_K, weight.blocksize)
    merge_lora_kernel[(K // block_k, cdiv(N, BLOCK_N))](
        weight.packed,
        *absmax_pointers(weight),
        lora.A,
        lora.B,
        out,
        N,
        K,
        lora.r,
        float(lora.scaling),
        BLOCKSIZE=weight.blocksize,
        DOUBLE_QUANT=weight.double_quant,
        BLOCK_N=BLOCK_N,
        BLOCK_K=block_k,
        BLOCK_R=rank_tile(lora.r, out.dtype),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


_merge_by_torch = composed_merged_lora.merge_by_torch(dequantize_nf4)


def linear_nf4_lora_merged(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> Tensor:
    """Return y. See ops/linear_nf4_lora_merged.py for the contract."""
    if plan_for("linear_nf4", x, weight).path != "decode":
        return linear_nf4_lora(x, weight, bias, lora)[0]
    return composed_merged_lora.forward(x, weight, bias, lora, merge_lora)


def linear_nf4_lora_merged_backward(
    grad_y: Tensor, x: Tensor, weight: Weight, lora: LoRA, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x, grad_A, grad_B), empty where not needed. See ops/linear_nf4_lora_merged.py for the contract."""
    s = lora_down(x, lora.A, dropout_of(None, 0.0, x)) if needs.need_grad_B else x.new_empty(0)
    if not (needs.need_grad_x and plan_for("linear_nf4_grad_x", grad_y, weight).path == "decode"):
        return linear_nf4_lora_backward(grad_y, x, s, weight, lora, needs)
    _, grad_A, grad_B = linear_nf4_lora_backward(grad_y, x, s, weight, lora, needs._replace(need_grad_x=False))
    return composed_merged_lora.grad_x(grad_y, weight, lora, merge_lora), grad_A, grad_B
