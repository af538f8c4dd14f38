"""Bundles of tensors and numbers that kernels take as one argument.

An op's schema lists the fields side by side, as plain tensors and numbers (`schema()`, in the order of the fields), as
torch.compile and export require. `_implement.spread` builds the bundles from a call's arguments, and `*weight` lists
the fields again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..format.quant_state import Constants, QuantState


class Weight(NamedTuple):
    """W [N, K] in NF4, row-major; [1, numel] for dequantize_nf4, which has no matrix shape.

    packed: uint8, two indices a byte.   blocksize: weights per absmax.   Exactly one kind of constants is given:
    absmax fp32 [n_blocks]; or absmax_q uint8 [n_blocks], absmax_scale fp32 [ceil(n_blocks / 256)] and absmax_offset
    fp32 [].
    """

    packed: Tensor
    absmax: Tensor | None
    absmax_q: Tensor | None
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    blocksize: int
    N: int
    K: int

    @staticmethod
    def schema() -> str:
        """Return the fields as arguments of an op's schema."""
        constants = "Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_offset"
        return f"Tensor packed, {constants}, int blocksize, SymInt out_features, SymInt in_features"

    @property
    def constants(self) -> Constants:
        """The four constants in the order of the schema: absmax, absmax_q, absmax_scale, absmax_offset."""
        return self.absmax, self.absmax_q, self.absmax_scale, self.absmax_offset

    @property
    def double_quant(self) -> bool:
        """Whether the constants are stored in 8 bits."""
        return self.absmax is None


class WeightLists(NamedTuple):
    """The fields of several weights as lists: entry i of each list belongs to weight i."""

    packed: Sequence[Tensor]
    absmax: Sequence[Tensor | None]
    absmax_q: Sequence[Tensor | None]
    absmax_scale: Sequence[Tensor | None]
    absmax_offset: Sequence[Tensor | None]
    blocksizes: Sequence[int]
    N: Sequence[int]
    K: Sequence[int]

    @staticmethod
    def schema() -> str:
        """Return the fields as arguments of an op's schema."""
        constants = "Tensor?[] absmax, Tensor?[] absmax_q, Tensor?[] absmax_scale, Tensor?[] absmax_offset"
        return f"Tensor[] packed, {constants}, int[] blocksizes, SymInt[] out_features, SymInt[] in_features"

    @staticmethod
    def of(weights: Sequence[Weight]) -> WeightLists:
        """Return the fields of `weights` as lists."""
        return WeightLists(*[list(field) for field in zip(*weights, strict=True)])

    def weights(self) -> list[Weight]:
        """Return one Weight for each entry."""
        return [Weight(*fields) for fields in zip(*self, strict=True)]


class LoRA(NamedTuple):
    """One adapter: scaling * B A dropout(x).   A: [r, K], B: [N, r], any float dtype.   seed: int64 [1] or None."""

    A: Tensor
    B: Tensor
    seed: Tensor | None
    scaling: float
    dropout_p: float

    @staticmethod
    def schema() -> str:
        """Return the fields as arguments of an op's schema."""
        return "Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, float dropout_p"

    @property
    def r(self) -> int:
        """The rank r, the number of rows of A."""
        return self.A.shape[0]


class MultiLoRA(NamedTuple):
    """E adapters, one for each row of x: scalings[e] * B_e A_e dropout(x[m]) with e = adapter[m]; -1 is none.

    A: [E, r, K], B: [E, N, r], any float dtype.   scalings: fp32 [E].   adapter: int64 [M].   seed: int64 [1] or None.
    """

    A: Tensor
    B: Tensor
    scalings: Tensor
    adapter: Tensor
    seed: Tensor | None
    dropout_p: float

    @staticmethod
    def schema() -> str:
        """Return the fields as arguments of an op's schema."""
        return "Tensor lora_A, Tensor lora_B, Tensor scalings, Tensor adapter, Tensor? seed, float dropout_p"

    @property
    def r(self) -> int:
        """The common rank of all adapters; the factors of smaller ranks are padded with zeros."""
        return self.A.shape[1]


class GroupLoRA(NamedTuple):
    """One adapter for each of several linears on the same x: scalings[i] * B_i A_i dropout(x), with one mask.

    A: [sum of r_i, K], the A_i stacked by rows; B_i: [N_i, r_i], any float dtype.   seed: int64 [1] or None.
    """

    A: Tensor
    B: Sequence[Tensor]
    seed: Tensor | None
    scalings: Sequence[float]
    dropout_p: float

    @staticmethod
    def schema() -> str:
        """Return the fields as arguments of an op's schema."""
        return "Tensor lora_A, Tensor[] lora_B, Tensor? seed, float[] scalings, float dropout_p"

    @property
    def ranks(self) -> list[int]:
        """The ranks r_i of the adapters."""
        return [B.shape[1] for B in self.B]

    @property
    def r(self) -> int:
        """The total rank, the sum of all r_i."""
        return self.A.shape[0]

    def split_per_linear(self) -> list[LoRA]:
        """Return one LoRA for each linear, whose A is a view of this A."""
        members = zip(torch.split(self.A, self.ranks), self.B, self.scalings, strict=True)
        return [LoRA(A, B, self.seed, scaling, self.dropout_p) for A, B, scaling in members]


class Needs(NamedTuple):
    """The gradients that a backward op of LoRA linears computes; Needs() is all of them. It returns empty tensors in
    place of the others.

    need_grad_A, need_grad_B: of any linear of a group.
    """

    need_grad_x: bool = True
    need_grad_A: bool = True
    need_grad_B: bool = True

    @property
    def need_ds(self) -> bool:
        """Whether ds = scaling * grad_y B is needed, of which grad_x and grad_A are computed."""
        return self.need_grad_x or self.need_grad_A

    @staticmethod
    def schema() -> str:
        """Return the fields as arguments of an op's schema."""
        return "bool need_grad_x, bool need_grad_A, bool need_grad_B"

    def only(self, grad_x: Tensor, grad_A: Tensor, grad_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients, with an empty tensor in place of each that is not needed."""
        return (
            grad_x if self.need_grad_x else grad_x.new_empty(0),
            grad_A if self.need_grad_A else grad_A.new_empty(0),
            grad_B if self.need_grad_B else grad_B.new_empty(0),
        )


def weight_of(op: str, packed: Tensor, state: QuantState) -> Weight:
    """Return the Weight of a two-dimensional weight. Raises ValueError if `state` describes another shape."""
    if len(state.shape) != 2:
        raise ValueError(f"{op}: state must describe a two-dimensional weight, got shape {tuple(state.shape)}")
    N, K = state.shape
    return Weight(packed, *state.constants, state.blocksize, N, K)
