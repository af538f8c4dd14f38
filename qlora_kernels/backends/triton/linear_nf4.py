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
from .dropout import NO_DROPOUT, Dropout, DropoutRate, dropout_of
from .launch import KEPT_LAUNCHES
from .launch_sequence import LaunchSequence, Slot
from .linear_nf4_gemm import linear_nf4_grad_x_kernel, linear_nf4_kernel
from .linear_nf4_small_m import linear_nf4_small_m_kernel
from .lora_up import lora_up, up_launch
from .partials import rank_tile
from .planner import Plan, addition_reason, capability_for, forced_plan, plan_of

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


class Product(NamedTuple):
    """All that the launches of a base product and of its low-rank term depend on, the key under which they are kept.

    r: None without a low-rank term.   scaling: of that term.   forced: the plan of `use_plan`, or None.
    """

    M: int
    N: int
    K: int
    r: int | None
    dtype: torch.dtype
    blocksize: int
    double_quant: bool
    scaling: float
    capability: int
    forced: Plan | None

    def plan(self, op: str) -> Plan:
        """Return the plan of the base product, which is the same with and without an adapter."""
        sizes = (self.M, self.N, self.K, self.blocksize, self.double_quant)
        return plan_of(op, self.dtype, *sizes, self.capability)


def product_of(op: str, rows: Tensor, weight: Weight, r: int | None = None, scaling: float = 1.0) -> Product:
    """Return the Product of a call. op: of the base product.   rows: x or grad_y."""
    _, absmax, _, _, _, blocksize, N, K = weight
    sizes = (rows.size(0), N, K, r, rows.dtype, blocksize, absmax is None)
    # In half the time of Product(...), once for each call of a layer.
    return tuple.__new__(Product, (*sizes, float(scaling), capability_for(rows), forced_plan(op)))


def _rank_and_scaling(low_rank: LowRankTerm | None) -> tuple[int | None, float]:
    return (None, 1.0) if low_rank is None else (low_rank.left.size(1), float(low_rank.scaling))


def forward(x: Tensor, weight: Weight, bias: Tensor | None, low_rank: LowRankTerm | None) -> Tensor:
    """Return y = x W^T + bias + scaling * s B^T."""
    product = product_of("linear_nf4", x, weight, *_rank_and_scaling(low_rank))
    chosen, sequence = _forward_sequence(product, bias is not None)
    if sequence is None:
        y = x @ decoded(weight, x.dtype).T
        if low_rank is not None or bias is not None:
            term = {"left": None, "right": None, "scaling": 1.0} if low_rank is None else low_rank._asdict()
            lora_up(y, **term, right_is_transposed=True, bias=bias, dropout=dropout_of(None, 0.0, x))
        return y
    left, right = (x, x) if low_rank is None else (low_rank.left, low_rank.right)
    packed = packed_for(chosen, weight)
    (y,) = sequence(x, packed, *absmax_pointers(weight), x if bias is None else bias, left, right)
    return y


def packed_for(chosen: Plan, weight: Weight) -> Tensor:
    """Return the packed weights as the kernel of a plan reads them."""
    return whole_words(weight.packed) if chosen.path == "small_m" else weight.packed


@lru_cache(maxsize=KEPT_LAUNCHES)
def _forward_sequence(product: Product, has_bias: bool) -> tuple[Plan, LaunchSequence | None]:
    """Return the plan, and the launches of (x, packed, four pointers to constants, bias, s, lora_B) unless it decodes
    first.
    """
    chosen = product.plan("linear_nf4")
    if chosen.path == "decode":
        return chosen, None
    sequence = LaunchSequence(inputs=9)
    sequence.returns(add_forward(sequence, range(6), 6 if has_bias else None, (7, 8), chosen, product))
    return chosen, sequence


def add_forward(
    sequence: LaunchSequence,
    x_and_weight: Sequence[Slot],
    bias: Slot | None,
    low_rank: tuple[Slot, Slot],
    chosen: Plan,
    product: Product,
) -> Slot:
    """Add y = x W^T + bias + scaling * s B^T to a sequence, by a plan that does not decode first; return its slot.

    x_and_weight: x, packed and the four pointers to constants.   low_rank: s and lora_B, not used without them.
    """
    M, N, K, r, dtype, blocksize, double_quant, scaling, *_ = product
    R = 1 if r is None else r
    flags = {
        "BLOCKSIZE": blocksize,
        "DOUBLE_QUANT": double_quant,
        "HAS_BIAS": bias is not None,
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
        grid = (tiles_n, chosen.split_k)
        numbers = (N, K, R, scaling)
        launch = linear_nf4_small_m_kernel.prepare(grid, numbers, M=M, maxnreg=SMALL_M_REGISTERS, **flags)
    else:
        grid = (cdiv(M, chosen.block_m) * tiles_n, chosen.split_k)
        launch = linear_nf4_kernel.prepare(grid, (M, N, K, R, scaling), BLOCK_M=chosen.block_m, **flags)
    x = x_and_weight[0]
    last = (x if bias is None else bias, *low_rank)
    if chosen.split_k == 1:
        y = sequence.allocate((M, N), dtype)
        sequence.add(launch, *x_and_weight, *last, y)
        return y
    parts = sequence.allocate((chosen.split_k, M, N), torch.float32)
    y = sequence.allocate((M, N), dtype)
    sequence.add(launch, *x_and_weight, *last, parts)
    added = up_launch(M, N, r, dtype, chosen.split_k, scaling, bias is not None, NO_DROPOUT, True)
    sequence.add(added, parts, *low_rank, last[0], x, y)
    return y


def backward(grad_y: Tensor, weight: Weight, low_rank: LowRankTerm | None, dropout: Dropout) -> Tensor:
    """Return grad_x = grad_y W + scaling * keep * (ds A)."""
    product = product_of("linear_nf4_grad_x", grad_y, weight, *_rank_and_scaling(low_rank))
    sequence = _backward_sequence(product, dropout.rate)
    if sequence is None:
        grad_x = grad_y @ decoded(weight, grad_y.dtype)
        if low_rank is not None:
            add_low_rank(grad_x, low_rank, dropout)
        return grad_x
    left, right = (grad_y, grad_y) if low_rank is None else (low_rank.left, low_rank.right)
    (grad_x,) = sequence(grad_y, weight.packed, *absmax_pointers(weight), left, right, dropout.seed)
    return grad_x


@lru_cache(maxsize=KEPT_LAUNCHES)
def _backward_sequence(product: Product, rate: DropoutRate) -> LaunchSequence | None:
    """Return the launches of (grad_y, packed, four pointers to constants, ds, lora_A, seed), or None where the plan
    decodes first.
    """
    chosen = product.plan("linear_nf4_grad_x")
    if chosen.path == "decode":
        return None
    sequence = LaunchSequence(inputs=9)
    sequence.returns(add_backward(sequence, range(6), (6, 7), 8, chosen, product, rate))
    return sequence


def add_backward(
    sequence: LaunchSequence,
    grad_y_and_weight: Sequence[Slot],
    low_rank: tuple[Slot, Slot],
    seed: Slot,
    chosen: Plan,
    product: Product,
    rate: DropoutRate,
) -> Slot:
    """Add grad_x = grad_y W + scaling * keep * (ds A) to a sequence, by a plan that does not decode first; return its
    slot.

    grad_y_and_weight: grad_y, packed and the four pointers to constants.   low_rank: ds and lora_A, not used without
    them.
    """
    M, N, K, r, dtype, blocksize, double_quant, scaling, *_ = product
    R = 1 if r is None else r
    launch = linear_nf4_grad_x_kernel.prepare(
        (cdiv(M, chosen.block_m) * cdiv(K, chosen.block_k), chosen.split_k),
        (M, N, K, R, scaling, rate.threshold),
        BLOCKSIZE=blocksize,
        DOUBLE_QUANT=double_quant,
        HAS_LORA=r is not None,
        DROPOUT=rate.elements_per_philox_call(K),
        SPLIT=chosen.split_k > 1,
        BLOCK_M=chosen.block_m,
        BLOCK_N=GRAD_X_BLOCK_N,
        BLOCK_K=chosen.block_k,
        BLOCK_R=rank_tile(R, dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=False,
    )
    if chosen.split_k == 1:
        grad_x = sequence.allocate((M, K), dtype)
        sequence.add(launch, *grad_y_and_weight, *low_rank, seed, grad_x)
        return grad_x
    parts = sequence.allocate((chosen.split_k, M, K), torch.float32)
    grad_x = sequence.allocate((M, K), dtype)
    sequence.add(launch, *grad_y_and_weight, *low_rank, seed, parts)
    added = up_launch(M, K, r, dtype, chosen.split_k, scaling, False, rate, False)
    sequence.add(added, parts, *low_rank, grad_y_and_weight[0], seed, grad_x)
    return grad_x


def add_low_rank(grad_x: Tensor, low_rank: LowRankTerm, dropout: Dropout) -> None:
    """Add scaling * keep * (ds A) to grad_x in place."""
    lora_up(grad_x, **low_rank._asdict(), right_is_transposed=False, bias=None, dropout=dropout)


def linear_nf4(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return y = x W^T + bias. See ops/linear_nf4.py for the contract."""
    return forward(x, weight, bias, None)


def linear_nf4_grad_x(grad_y: Tensor, weight: Weight) -> Tensor:
    """Return grad_x = grad_y W. See ops/linear_nf4.py for the contract."""
    return backward(grad_y, weight, None, dropout_of(None, 0.0, grad_y))
