"""The low-rank term inside the base product, for backends that decode W into a workspace and call torch's matmul.

    forward    y_i    = [x | s_i] [W_i | scaling_i B_i]^T + bias_i
    backward   grad_x = [grad_y_1 | grad_y_2 | ... | ds] [W_1 ; W_2 ; ... ; A]

One product over K + r computes what otherwise takes a product and an addition that reads and writes its result. Dropout
is inside s in forward; in backward its mask applies to ds A alone, which is then left out of the product. x and the
grad_y are copied once, by the backend's kernel that reads them for s and ds. r is padded to COLUMNS with zeros, so that
rows start at multiples of 32 bytes.

scaling * B is computed in fp32 and rounded once to x's dtype; the addition that is replaced rounds B alone. Both errors
are at most one unit roundoff of each element of scaling * B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..rounding import round_up
from .operands import GroupLoRA, LoRA, Weight

COLUMNS = 16
"""The columns beside x, W and grad_y are a multiple of this number: the contraction of one tensor-core instruction."""

WIDEST = {80: 1.5, 86: 1.0, 89: 1.5, 90: 1.5, 100: 1.5, 120: 1.25}
"""Largest K / N for which a copy of x is cheaper than an addition to y, by compute capability; another one takes the
nearest below it. From the model in bench/roofline.py, rounded down to quarters; predicted, not run on a GPU."""

Decode = Callable[[Weight, Tensor], None]
"""decode(weight, out): dequantize weight into out [N, K], whose rows may have a stride."""

INSIDE, ADDED = "torch.matmul over K + r", "torch.matmul, and an addition of the low-rank term"
"""What follows the decode of a LoRA linear, as plans name it."""
MERGED = "merge_lora, then torch.matmul"
"""The plan of a LoRA linear whose update is added to the decoded weight."""


def forward_obstacle(K: int, N: int, dtype: torch.dtype, capability: int) -> str | None:
    """Return why y_i is better computed by a product and an addition, or None. N: outputs of all linears on this x."""
    if dtype == torch.float32:
        return "fp32 products are bound by their arithmetic"
    widest = _widest(capability)
    return None if widest * N >= K else f"K={K} > {widest:g} * N={N}: a copy of x costs more than an addition to y"


def backward_obstacle(K: int, N: int, linears: int, dropout: bool, dtype: torch.dtype, capability: int) -> str | None:
    """Return why grad_x is better computed by additions, or None. N: outputs of all linears, whose number is `linears`.

    The product saves one addition to grad_x for each linear but the first, and one for ds A without dropout.
    """
    if dtype == torch.float32:
        return "fp32 products are bound by their arithmetic"
    saved = linears - 1 if dropout else linears
    if saved == 0:
        return "dropout applies to ds A alone"
    bound = _widest(capability) * saved
    return (
        None if bound * K >= N else f"N={N} > {bound:g} * K={K}: a copy of grad_y costs more than additions to grad_x"
    )


def padded(r: int) -> int:
    """Return the number of columns that r columns take beside x, W or grad_y."""
    return round_up(r, COLUMNS)


def operand(rows: Tensor, width: int, r: int) -> Tensor:
    """Allocate [M, width + padded(r)] in the dtype of rows [M, ...], for `width` columns and r beside them."""
    return rows.new_empty(rows.shape[0], width + padded(r))


def forward(
    both: Tensor,
    s: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora: GroupLoRA,
    decode: Decode,
) -> list[Tensor]:
    """Return y_i = [x | s_i] [W_i | scaling_i B_i]^T + bias_i for each linear.

    both: the operand of width K and the largest rank, which holds x; its other columns are written here.
    s: [M, sum of r_i].
    """
    ys = []
    parts = torch.split(s, lora.ranks, dim=1)
    for weight, bias, part, B, scaling in zip(weights, biases, parts, lora.B, lora.scalings, strict=True):
        K, r = weight.K, B.shape[1]
        left, w = both[:, : K + padded(r)], operand(both.new_empty(weight.N, 0), K, r)
        left[:, K : K + r].copy_(part)
        decode(weight, w[:, :K])
        # Of two 16-bit dtypes torch would round the product to B's before it rounds to x's.
        factor = B.detach() if B.dtype == both.dtype else B.detach().float()
        torch.mul(factor, scaling, out=w[:, K : K + r])
        for padding in (left[:, K + r :], w[:, K + r :]) if r % COLUMNS else ():
            padding.zero_()
        ys.append(left @ w.T if bias is None else torch.addmm(bias.to(left.dtype), left, w.T))
    return ys


def backward(both: Tensor, weights: Sequence[Weight], low_rank: tuple[Tensor, Tensor] | None, decode: Decode) -> Tensor:
    """Return grad_x = [grad_y_1 | ... | ds] [W_1 ; ... ; A].

    both: the operand whose first columns hold the grad_y of all linears; its other columns are written here.
    low_rank: ds [M, r] and A [r, K]; None under dropout, for the sum of grad_y_i W_i alone: then r is 0 in `both`.
    """
    w = both.new_empty(both.shape[1], weights[0].K)
    row = 0
    for weight in weights:
        decode(weight, w[row : row + weight.N])
        row += weight.N
    if low_rank is not None:
        ds, A = low_rank
        stop = row + ds.shape[1]
        both[:, row:stop].copy_(ds)
        w[row:stop].copy_(A.detach())
        for padding in (both[:, stop:], w[stop:]) if ds.shape[1] % COLUMNS else ():
            padding.zero_()
    return both @ w


def group_of_one(lora: LoRA) -> GroupLoRA:
    """Return the adapter of a single linear as a group."""
    return GroupLoRA(lora.A, [lora.B], lora.seed, [lora.scaling], lora.dropout_p)


def _widest(capability: int) -> float:
    known = [c for c in WIDEST if c <= capability]
    return WIDEST[max(known, default=min(WIDEST))]
