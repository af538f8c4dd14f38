"""Launchers of y = x W^T + bias and grad_x = grad_y W, which follow the plan of planner.py.

small_m: linear_nf4_small_m.py multiplies one or two rows without tensor cores; forward only.
fused:   linear_nf4_gemm.py decodes the weight inside the matmul. In both, lora_up.py adds the partial sums of splits.
decode:  the weight is decoded once into a workspace, and torch's matmul multiplies, over K + r where a low-rank term
         fits in (ops/extended_k.py).

The workspace is an allocation of the call. PyTorch's caching allocator reuses the block for the next layer on the same
stream. This is safe, because reuse is ordered by the stream, and inside a captured graph the block is from the graph's
pool. A buffer kept across calls would need extra code for each of these properties.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.operands import Weight
from ...rounding import cdiv
from .constants import absmax_pointers
from .dequantize_nf4 import dequantize_nf4
from .dropout import Dropout, dropout_of
from .launch import KEPT_LAUNCHES, Launch, Launchable
from .linear_nf4_gemm import linear_nf4_grad_x_kernel, linear_nf4_kernel
from .linear_nf4_small_m import linear_nf4_small_m_kernel
from .lora_up import lora_up
from .partials import rank_tile
from .planner import Plan, addition_reason, capability_for, plan_of

GRAD_X_BLOCK_N = 64
"""Step along N of the grad_x kernel."""

SMALL_M_REGISTERS = 168
"""Register limit for two rows: without it ptxas stops at 128 on sm_90 and spills two; 168 allow 12 warps per SM."""


class LowRankTerm(NamedTuple):
    """The adapter's term of a result, scaling * keep * (left @ right), with right = lora_B [N, r] or lora_A [r, K]."""

    left: Tensor
    right: Tensor
    scaling: float


def decoded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight decoded into a workspace [N, K] of `dtype`."""
    workspace = torch.empty((weight.N, weight.K), dtype=dtype, device=weight.packed.device)
    dequantize_nf4(weight, out=workspace)
    return workspace


def decode_into(weight: Weight, out: Tensor) -> None:
    """Decode the weight into out [N, K], whose rows may have a stride."""
    dequantize_nf4(weight, out=out)


def added_outside(op: str, rows: Tensor, weights: Sequence[Weight], dropout: Dropout) -> bool:
    """Whether the low-rank terms of linears on one x are added to their products, not inside products over K + r.

    op: a LoRA op, forward or backward, of one linear or of a group.   rows: x.
    """
    return addition_reason(op, rows.shape[0], weights, rows.dtype, dropout.on, capability_for(rows)) is not None


def whole_words(packed: Tensor) -> Tensor:
    """Return `packed`, or a copy if it is a view that does not start at a 4-byte boundary."""
    return packed if packed.data_ptr() % 4 == 0 else packed.clone()


def plan_for(op: str, rows: Tensor, weight: Weight) -> Plan:
    """Return the plan of the base matmul, which is the same with and without an adapter."""
    sizes = (rows.shape[0], weight.N, weight.K, weight.blocksize, weight.double_quant)
    return plan_of(op, rows.dtype, *sizes, capability_for(rows))


def forward(x: Tensor, weight: Weight, bias: Tensor | None, low_rank: LowRankTerm | None) -> Tensor:
    """Return y = x W^T + bias + scaling * s B^T."""
    left, right, scaling = low_rank if low_rank is not None else (None, None, 1.0)
    chosen = plan_for("linear_nf4", x, weight)
    if chosen.path == "decode":
        y = parts = x @ decoded(weight, x.dtype).T
    else:
        y = x.new_empty(x.shape[0], weight.N)
        parts = _parts(y, chosen.split_k)
        launch = _forward_launch(
            linear_nf4_small_m_kernel if chosen.path == "small_m" else linear_nf4_kernel,
            chosen,
            x.shape[0],
            weight.N,
            weight.K,
            None if left is None else left.shape[1],
            x.dtype,
            weight.blocksize,
            weight.double_quant,
            bias is not None,
            float(scaling),
        )
        launch(
            x,
            whole_words(weight.packed) if chosen.path == "small_m" else weight.packed,
            *absmax_pointers(weight),
            x if bias is None else bias,
            x if left is None else left,
            x if right is None else right,
            parts,
        )
    if parts is not y or (chosen.path == "decode" and (bias is not None or low_rank is not None)):
        no_dropout = dropout_of(None, 0.0, x)
        lora_up(
            parts, y, left=left, right=right, right_is_transposed=True, scaling=scaling, bias=bias, dropout=no_dropout
        )
    return y


@lru_cache(maxsize=KEPT_LAUNCHES)
def _forward_launch(
    kernel: Launchable,
    chosen: Plan,
    M: int,
    N: int,
    K: int,
    r: int | None,
    dtype: torch.dtype,
    blocksize: int,
    double_quant: bool,
    has_bias: bool,
    scaling: float,
) -> Launch:
    """Return the launch of the kernel of `chosen`. r: None without a low-rank term."""
    R = 1 if r is None else r
    flags = {
        "BLOCKSIZE": blocksize,
        "DOUBLE_QUANT": double_quant,
        "HAS_BIAS": has_bias,
        "HAS_LORA": r is not None,
        "SPLIT": chosen.split_k > 1,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "BLOCK_R": rank_tile(R, dtype),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        "enable_fp_fusion": False,
    }
    tiles_n = cdiv(N, chosen.block_n)
    if chosen.path == "small_m":
        return kernel.prepare((tiles_n, chosen.split_k), (N, K, R, scaling), M=M, maxnreg=SMALL_M_REGISTERS, **flags)
    grid = (cdiv(M, chosen.block_m) * tiles_n, chosen.split_k)
    return kernel.prepare(grid, (M, N, K, R, scaling), BLOCK_M=chosen.block_m, **flags)


def backward(grad_y: Tensor, weight: Weight, low_rank: LowRankTerm | None, dropout: Dropout) -> Tensor:
    """Return grad_x = grad_y W + scaling * keep * (ds A)."""
    left, right, scaling = low_rank if low_rank is not None else (None, None, 1.0)
    chosen = plan_for("linear_nf4_grad_x", grad_y, weight)
    if chosen.path == "decode":
        grad_x = grad_y @ decoded(weight, grad_y.dtype)
        if low_rank is not None:
            add_low_rank(grad_x, low_rank, dropout)
        return grad_x
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.K)
    parts = _parts(grad_x, chosen.split_k)
    launch = _backward_launch(
        linear_nf4_grad_x_kernel,
        chosen,
        grad_y.shape[0],
        weight.N,
        weight.K,
        None if left is None else left.shape[1],
        grad_y.dtype,
        weight.blocksize,
        weight.double_quant,
        float(scaling),
        dropout.elements_per_philox_call(weight.K),
        dropout.threshold,
    )
    launch(
        grad_y,
        weight.packed,
        *absmax_pointers(weight),
        grad_y if left is None else left,
        grad_y if right is None else right,
        dropout.seed,
        parts,
    )
    if parts is not grad_x:
        lora_up(
            parts,
            grad_x,
            left=left,
            right=right,
            right_is_transposed=False,
            scaling=scaling,
            bias=None,
            dropout=dropout,
        )
    return grad_x


@lru_cache(maxsize=KEPT_LAUNCHES)
def _backward_launch(
    kernel: Launchable,
    chosen: Plan,
    M: int,
    N: int,
    K: int,
    r: int | None,
    dtype: torch.dtype,
    blocksize: int,
    double_quant: bool,
    scaling: float,
    dropout: int,
    threshold: int,
) -> Launch:
    """Return the launch of the grad_x kernel. r: None without a low-rank term.   dropout: DROPOUT."""
    R = 1 if r is None else r
    return kernel.prepare(
        (cdiv(M, chosen.block_m) * cdiv(K, chosen.block_k), chosen.split_k),
        (M, N, K, R, scaling, threshold),
        BLOCKSIZE=blocksize,
        DOUBLE_QUANT=double_quant,
        HAS_LORA=r is not None,
        DROPOUT=dropout,
        SPLIT=chosen.split_k > 1,
        BLOCK_M=chosen.block_m,
        BLOCK_N=GRAD_X_BLOCK_N,
        BLOCK_K=chosen.block_k,
        BLOCK_R=rank_tile(R, dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=False,
    )


def _parts(out: Tensor, split_k: int) -> Tensor:
    """Return fp32 memory for the partial sums of `split_k` splits, or out itself for one."""
    return out if split_k == 1 else out.new_empty(split_k, *out.shape, dtype=torch.float32)


def add_low_rank(grad_x: Tensor, low_rank: LowRankTerm, dropout: Dropout) -> None:
    """Add scaling * keep * (ds A) to grad_x in place."""
    left, right, scaling = low_rank
    lora_up(
        grad_x, grad_x, left=left, right=right, right_is_transposed=False, scaling=scaling, bias=None, dropout=dropout
    )


def linear_nf4(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return y = x W^T + bias. See ops/linear_nf4.py for the contract."""
    return forward(x, weight, bias, None)


def linear_nf4_grad_x(grad_y: Tensor, weight: Weight) -> Tensor:
    """Return grad_x = grad_y W. See ops/linear_nf4.py for the contract."""
    return backward(grad_y, weight, None, dropout_of(None, 0.0, grad_y))
