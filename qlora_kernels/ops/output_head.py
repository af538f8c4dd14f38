"""The output head of linear_cross_entropy: a dense or NF4 weight, further low-rank columns, and its logits.

A low-rank update of the head, scaling * B A, is computed as r more columns: the hidden states are followed by
s = hidden @ A.T, and the weight by low_rank = scaling * B. The op then has one product for both parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..format.double_quant import NESTED_BLOCKSIZE
from ..format.quant_state import n_blocks
from .operands import Weight

DECODED_BYTES = 64 << 20
"""Bytes of the rows of a head that `Head.parts` dequantizes at one time."""


class Head(NamedTuple):
    """An output head.

    weight: [V, K] in any float dtype, or the packed bytes of an NF4 weight.   bias: [V] in any float dtype, or None.
    logit_scale: factor of the logits.   softcap: their bound, 0 for none.
    low_rank: [V, r], the last columns of the weight, or None.
    absmax .. in_features: fields of an NF4 weight, as in Weight; blocksize is 0 for a dense weight.
    """

    weight: Tensor
    bias: Tensor | None
    ignore_index: int
    logit_scale: float
    softcap: float
    low_rank: Tensor | None = None
    absmax: Tensor | None = None
    absmax_q: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None
    blocksize: int = 0
    out_features: int = 0
    in_features: int = 0

    @staticmethod
    def schema() -> str:
        """Return the fields as arguments of an op's schema."""
        return (
            "Tensor weight, Tensor? bias, int ignore_index, float logit_scale, float softcap, Tensor? low_rank, "
            "Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_offset, int blocksize, "
            "SymInt out_features, SymInt in_features"
        )

    @property
    def nf4(self) -> Weight | None:
        """The NF4 weight, or None if the weight is dense."""
        if self.blocksize == 0:
            return None
        constants = (self.absmax, self.absmax_q, self.absmax_scale, self.absmax_offset)
        return Weight(self.weight, *constants, self.blocksize, self.out_features, self.in_features)

    @property
    def V(self) -> int:
        """The size of the vocabulary."""
        return self.weight.shape[0] if self.blocksize == 0 else self.out_features

    @property
    def rank(self) -> int:
        """The number of low-rank columns."""
        return 0 if self.low_rank is None else self.low_rank.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows [start, stop) of the weight with its low-rank columns, dense, in `dtype`; differentiable."""
        nf4 = self.nf4
        rows = self.weight[start:stop].to(dtype) if nf4 is None else _decoded_rows(nf4, start, stop, dtype)
        return rows if self.low_rank is None else torch.cat([rows, self.low_rank[start:stop].to(dtype)], dim=1)

    def parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns of the logits, rows of the weight): a dense head as one part, an NF4 head in parts of
        DECODED_BYTES.
        """
        step = self.V
        if self.blocksize or self.low_rank is not None:
            columns = (self.in_features or self.weight.shape[1]) + self.rank
            step = max(1, DECODED_BYTES // (columns * dtype.itemsize))
        for start in range(0, self.V, step):
            stop = min(start + step, self.V)
            yield slice(start, stop), self.rows(start, stop, dtype)


def logits_of(hidden: Tensor, weight: Tensor, head: Head, bias: Tensor | None) -> Tensor:
    """Return z [M, V] for `weight` and `bias`, which may be a part of the head's rows; fp32 for an fp32 `hidden`."""
    z = F.linear(hidden, weight)
    if bias is not None:
        z = z + bias.float()
    if head.logit_scale != 1.0:
        z = z * head.logit_scale
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


def grad_of_logits(z: Tensor, log_sums: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Return the gradient of each token's loss with respect to hidden @ weight.T + bias.

    z: [M, columns], a part of the columns of the logits. labels: relative to the first of these columns. A label
    outside them has no effect; the caller must mask tokens without a label in any part.
    """
    grad = torch.exp(z - log_sums[:, None])
    grad -= (torch.arange(z.shape[1], device=z.device) == labels[:, None]).to(grad.dtype)
    if head.softcap:
        grad *= 1.0 - (z / head.softcap).square()
    return grad * head.logit_scale


def _decoded_rows(weight: Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return rows [start, stop) of an NF4 weight.

    The decoded blocks start at a multiple of 256, at which a group of 8-bit constants starts.
    """
    group = NESTED_BLOCKSIZE * weight.blocksize
    begin, end = start * weight.K // group * group, stop * weight.K
    blocks = slice(begin // weight.blocksize, n_blocks(end, weight.blocksize))
    groups = slice(begin // group, n_blocks(blocks.stop, NESTED_BLOCKSIZE))
    absmax, absmax_q, absmax_scale, absmax_offset = weight.constants
    piece = Weight(
        weight.packed.reshape(-1)[begin // 2 : (end + 1) // 2],
        None if absmax is None else absmax[blocks],
        None if absmax_q is None else absmax_q[blocks],
        None if absmax_scale is None else absmax_scale[groups],
        absmax_offset,
        weight.blocksize,
        1,
        end - begin,
    )
    decoded: Tensor = torch.ops.qlora_kernels.dequantize_nf4.default(*piece, dtype=dtype)
    return decoded.view(-1)[start * weight.K - begin :].view(stop - start, weight.K)
