"""rms_norm and its gradients, one row per program, so that each row is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.rms_norm import y_dtype
from ...rounding import next_power_of_2
from .launch import launchable
from .partials import sum_partials

MAX_PROGRAMS = 256
"""Programs of the backward pass, each with its own part of the weight's gradient; 1 MB of parts for 1024 columns."""


@launchable
@triton.jit
def rms_norm_kernel(
    p_x,
    p_residual,
    p_weight,
    p_s,
    p_y,
    p_scale,
    columns,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one row: s = x + residual, scale = 1 / rms(s), y = s * scale * (weight + OFFSET). See ops/rms_norm.py."""
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    o_x = row * columns + o_c
    s = tl.load(p_x + o_x, mask=m_c, other=0.0)
    if HAS_RESIDUAL:
        s = (s.to(tl.float32) + tl.load(p_residual + o_x, mask=m_c, other=0.0).to(tl.float32)).to(s.dtype)
        tl.store(p_s + o_x, s, mask=m_c)
    wide = s.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / columns + eps)
    tl.store(p_scale + row, scale)
    weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    n = wide * scale
    y = n * (weight + 1.0) if OFFSET else n.to(s.dtype).to(tl.float32) * weight
    tl.store(p_y + o_x, y.to(p_y.dtype.element_ty), mask=m_c)


@launchable
@triton.jit
def rms_norm_backward_kernel(
    p_grad_y,
    p_grad_s,
    p_s,
    p_weight,
    p_scale,
    p_grad_x,
    p_parts,
    rows,
    columns,
    HAS_GRAD_S: tl.constexpr,
    NEED_GRAD_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute grad_x of every num_programs-th row and a part of the weight's gradient, an fp32 row of p_parts."""
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    if OFFSET:
        weight += 1.0
    part = tl.zeros((BLOCK_C,), tl.float32)
    o_x = tl.program_id(0).to(tl.int64) * columns + o_c
    step = tl.num_programs(0).to(tl.int64) * columns
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        scale = tl.load(p_scale + row)
        grad_y = tl.load(p_grad_y + o_x, mask=m_c, other=0.0).to(tl.float32)
        n = tl.load(p_s + o_x, mask=m_c, other=0.0).to(tl.float32) * scale
        g = grad_y * weight
        grad_x = scale * (g - n * (tl.sum(g * n, axis=0) / columns))
        if HAS_GRAD_S:
            grad_x += tl.load(p_grad_s + o_x, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_grad_x + o_x, grad_x.to(p_grad_x.dtype.element_ty), mask=m_c)
        if NEED_GRAD_WEIGHT:
            part += grad_y * n
        o_x += step
    if NEED_GRAD_WEIGHT:
        tl.store(p_parts + tl.program_id(0).to(tl.int64) * columns + o_c, part, mask=m_c)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, s or empty, scale). See ops/rms_norm.py for the contract."""
    rows, columns = x.shape
    y = x.new_empty(x.shape, dtype=y_dtype(x, weight, weight_offset))
    s = x.new_empty(0) if residual is None else torch.empty_like(x)
    scale = x.new_empty(rows, dtype=torch.float32)
    block = next_power_of_2(columns)
    rms_norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        x if residual is None else s,
        y,
        scale,
        columns,
        eps,
        HAS_RESIDUAL=residual is not None,
        OFFSET=weight_offset != 0.0,
        BLOCK_C=block,
        num_warps=warps_of(block),
    )
    return y, s, scale


def rms_norm_backward(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_offset: float,
    *,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (grad_x, grad_weight or empty). See ops/rms_norm.py for the contract."""
    rows, columns = s.shape
    programs = min(rows, MAX_PROGRAMS) if need_grad_weight else rows
    grad_x = torch.empty_like(s)
    parts = s.new_empty((programs, columns) if need_grad_weight else (1,), dtype=torch.float32)
    block = next_power_of_2(columns)
    rms_norm_backward_kernel[(programs,)](
        grad_y,
        s if grad_s is None else grad_s,
        s,
        weight,
        scale,
        grad_x,
        parts,
        rows,
        columns,
        HAS_GRAD_S=grad_s is not None,
        NEED_GRAD_WEIGHT=need_grad_weight,
        OFFSET=weight_offset != 0.0,
        BLOCK_C=block,
        num_warps=warps_of(block),
    )
    return grad_x, sum_partials(parts, 1.0, weight.dtype) if need_grad_weight else weight.new_empty(0)


def warps_of(block: int) -> int:
    """Return the warps for a row of `block` columns: at most 32 values per thread up to 16384 columns."""
    return min(max(block // 512, 1), 16)
