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
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.operands import Weight
from ...ops.registry import Problem
from .constants import absmax_pointers
from .dequantize_nf4 import dequantize_nf4
from .dropout import Dropout, dropout_of
from .linear_nf4_gemm import linear_nf4_grad_x_kernel, linear_nf4_kernel
from .linear_nf4_small_m import linear_nf4_small_m_kernel
from .lora_up import lora_up
from .partials import rank_tile
from .planner import Plan, addition_reason, capability_of, plan
from .sizes import cdiv

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
    capability = capability_of(rows.device)
    return addition_reason(op, rows.shape[0], weights, rows.dtype, dropout.on, capability) is not None


def whole_words(packed: Tensor) -> Tensor:
    """Return `packed`, or a copy if it is a view that does not start at a 4-byte boundary."""
    return packed if packed.data_ptr() % 4 == 0 else packed.clone()


def plan_for(op: str, rows: Tensor, weight: Weight) -> Plan:
    """Return the plan of the base matmul, which is the same with and without an adapter."""
    problem = Problem(
        op, "cuda", rows.dtype, rows.shape[0], weight.N, weight.K, 0, weight.blocksize, weight.double_quant
    )
    return plan(problem, capability_of(rows.device))


def forward(x: Tensor, weight: Weight, bias: Tensor | None, low_rank: LowRankTerm | None) -> Tensor:
    """Return y = x W^T + bias + scaling * s B^T."""
    M, N, K = x.shape[0], weight.N, weight.K
    no_dropout = dropout_of(None, 0.0, x)
    left, right, scaling = low_rank if low_rank is not None else (None, None, 1.0)
    chosen = plan_for("linear_nf4", x, weight)
    if chosen.path == "decode":
        y = x @ decoded(weight, x.dtype).T
        if bias is not None or low_rank is not None:
            lora_up(
                y, y, left=left, right=right, right_is_transposed=True, scaling=scaling, bias=bias, dropout=no_dropout
            )
        return y
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    split = chosen.split_k > 1
    parts = torch.empty((chosen.split_k, M, N), dtype=torch.float32, device=x.device) if split else y
    r = 1 if left is None else left.shape[1]
    operands = (x if bias is None else bias, x if left is None else left, x if right is None else right, parts)
    flags = {
        "BLOCKSIZE": weight.blocksize,
        "DOUBLE_QUANT": weight.double_quant,
        "HAS_BIAS": bias is not None,
        "HAS_LORA": left is not None,
        "SPLIT": split,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "BLOCK_R": rank_tile(r, x.dtype),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        "enable_fp_fusion": False,
    }
    if chosen.path == "small_m":
        grid = (cdiv(N, chosen.block_n), chosen.split_k)
        flags["maxnreg"] = SMALL_M_REGISTERS
        linear_nf4_small_m_kernel[grid](
            x, whole_words(weight.packed), *absmax_pointers(weight), *operands, N, K, r, float(scaling), M=M, **flags
        )
    else:
        grid = (cdiv(M, chosen.block_m) * cdiv(N, chosen.block_n), chosen.split_k)
        flags["BLOCK_M"] = chosen.block_m
        linear_nf4_kernel[grid](
            x, weight.packed, *absmax_pointers(weight), *operands, M, N, K, r, float(scaling), **flags
        )
    if split:
        lora_up(
            parts, y, left=left, right=right, right_is_transposed=True, scaling=scaling, bias=bias, dropout=no_dropout
        )
    return y


def backward(grad_y: Tensor, weight: Weight, low_rank: LowRankTerm | None, dropout: Dropout) -> Tensor:
    """Return grad_x = grad_y W + scaling * keep * (ds A)."""
    M, N, K = grad_y.shape[0], weight.N, weight.K
    left, right, scaling = low_rank if low_rank is not None else (None, None, 1.0)
    chosen = plan_for("linear_nf4_grad_x", grad_y, weight)
    if chosen.path == "decode":
        grad_x = grad_y @ decoded(weight, grad_y.dtype)
        if low_rank is not None:
            add_low_rank(grad_x, low_rank, dropout)
        return grad_x
    grad_x = torch.empty((M, K), dtype=grad_y.dtype, device=grad_y.device)
    split = chosen.split_k > 1
    parts = torch.empty((chosen.split_k, M, K), dtype=torch.float32, device=grad_y.device) if split else grad_x
    r = 1 if left is None else left.shape[1]
    linear_nf4_grad_x_kernel[(cdiv(M, chosen.block_m) * cdiv(K, chosen.block_k), chosen.split_k)](
        grad_y,
        weight.packed,
        *absmax_pointers(weight),
        grad_y if left is None else left,
        grad_y if right is None else right,
        dropout.seed,
        parts,
        M,
        N,
        K,
        r,
        float(scaling),
        dropout.threshold,
        BLOCKSIZE=weight.blocksize,
        DOUBLE_QUANT=weight.double_quant,
        HAS_LORA=left is not None,
        DROPOUT=dropout.elements_per_philox_call(K),
        SPLIT=split,
        BLOCK_M=chosen.block_m,
        BLOCK_N=GRAD_X_BLOCK_N,
        BLOCK_K=chosen.block_k,
        BLOCK_R=rank_tile(r, grad_y.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=False,
    )
    if split:
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
