"""rope: rotary embedding of one tensor per launch; each program rotates some heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rounding import cdiv, next_power_of_2
from .launch import launchable

TILE = 2048
"""Pairs per program: 16 for each thread of four warps, in each half of a head."""

NUM_WARPS = 4


@launchable
@triton.jit
def rope_kernel(
    p_x,
    p_cos,
    p_sin,
    p_out,
    heads,
    T,
    half,
    stride_batch,
    stride_head,
    stride_token,
    out_stride_batch,
    out_stride_head,
    out_stride_token,
    table_stride,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Map (a, b) to (a cos_a + b to_a, b cos_b + a to_b), the rotation or its inverse. See ops/rope.py."""
    token = tl.program_id(0).to(tl.int64)
    batch, t = token // T, token % T
    o_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < half
    m_x = m_d & (o_h < heads)
    o_table = batch * table_stride + t * (2 * half) + o_d
    cos_a = tl.load(p_cos + o_table, mask=m_d, other=0.0).to(tl.float32)
    cos_b = tl.load(p_cos + o_table + half, mask=m_d, other=0.0).to(tl.float32)
    sin_a = tl.load(p_sin + o_table, mask=m_d, other=0.0).to(tl.float32)
    sin_b = tl.load(p_sin + o_table + half, mask=m_d, other=0.0).to(tl.float32)
    if INVERSE:
        to_a, to_b = sin_b, -sin_a
    else:
        to_a, to_b = -sin_a, sin_b
    o_x = batch * stride_batch + t * stride_token + o_h * stride_head + o_d
    a = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b = tl.load(p_x + o_x + half, mask=m_x, other=0.0).to(tl.float32)
    o_out = batch * out_stride_batch + t * out_stride_token + o_h * out_stride_head + o_d
    kind = p_out.dtype.element_ty
    tl.store(p_out + o_out, (a * cos_a + b * to_a).to(kind), mask=m_x)
    tl.store(p_out + o_out + half, (b * cos_b + a * to_b).to(kind), mask=m_x)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return (rotated q, rotated k). See ops/rope.py for the contract."""
    return _rotated(q, cos, sin, inverse), _rotated(k, cos, sin, inverse)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    B, heads, T, D = x.shape
    out = torch.empty_like(x)
    block_d = next_power_of_2(D // 2)
    block_h = min(next_power_of_2(heads), max(TILE // block_d, 1))
    rope_kernel[(B * T, cdiv(heads, block_h))](
        x,
        cos,
        sin,
        out,
        heads,
        T,
        D // 2,
        *x.stride()[:3],
        *out.stride()[:3],
        0 if cos.shape[0] == 1 else T * D,
        INVERSE=inverse,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
    )
    return out
