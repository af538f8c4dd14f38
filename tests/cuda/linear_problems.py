"""Linear problems as arguments of the CUDA launchers, with bounds on their results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.format import nf4
from tests.support.cuda_host import struct_of
from tests.support.problems import dtype_name
from tests.support.tolerances import Expected, exactly, product

from .launch_args import Members, gemm_args, nf4_weight, pairs_args, small_m_args
from .launching import poisoned, quantized

PAIR_SCALE = 1.436767578125
"""kPairScale of csrc/cuda/linear_nf4_pairs.cu."""


def pair_codes() -> Tensor:
    """Return the 16 code values with which linear_nf4_pairs.cu computes, in float64."""
    return (nf4.code() * PAIR_SCALE).bfloat16().double() / PAIR_SCALE


@dataclass(frozen=True)
class LinearProblem:
    """x [M, K], W [N, K] in NF4, bias [N], s [M, r], B [N, r]; the transposed product takes grad_y [M, N] for x."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    r: int = 0
    bias: torch.dtype | None = None
    lora_dtype: torch.dtype | None = None
    blocksize: int = 64
    double: bool = True
    transposed: bool = False

    scaling = 0.75

    def __str__(self) -> str:
        kind = "grad_x" if self.transposed else "forward"
        return f"{kind}-M{self.M}-N{self.N}-K{self.K}-r{self.r}-b{self.blocksize}-{dtype_name(self.dtype)}"

    @property
    def gemm_k(self) -> int:
        """The length of the contraction."""
        return self.N if self.transposed else self.K

    @property
    def gemm_n(self) -> int:
        """The number of columns of the result."""
        return self.K if self.transposed else self.N

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Return all tensors that the launchers read, from one seed."""
        generator = torch.Generator().manual_seed(self.M * 7 + self.N * 3 + self.K)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=generator) * scale

        packed, constants, absmax = quantized(normal(self.N * self.K, scale=0.05), self.blocksize, self.double)
        lora_dtype = self.lora_dtype or self.dtype
        return {
            "x": normal(self.M, self.gemm_k).to(self.dtype),
            "packed": packed,
            "constants": constants,
            "absmax": absmax,
            "bias": None if self.bias is None else normal(self.gemm_n).to(self.bias),
            "s": normal(self.M, self.r).to(self.dtype) if self.r else None,
            "B": normal(self.gemm_n, self.r, scale=0.1).to(lora_dtype) if self.r else None,
        }

    def small_m_args(self, y: Tensor) -> struct_of:
        """Return the argument of launch_linear_nf4_small_m."""
        return small_m_args(self.tensors["x"], self._weight(), self.tensors["bias"], self._lora(), y, self.M)

    def pairs_args(self, y: Tensor) -> struct_of:
        """Return the argument of launch_linear_nf4_pairs."""
        return pairs_args(self.tensors["x"], self._weight(), self.tensors["bias"], self._lora(), y, self.M)

    def gemm_args(self, y: Tensor, partial: Tensor | None = None) -> struct_of:
        """Return the argument of launch_linear_nf4_gemm."""
        operands = (self.tensors["x"], self._weight(), self.tensors["bias"], self._lora(), y, partial)
        return gemm_args(*operands, transposed=self.transposed)

    def _weight(self) -> Members:
        return nf4_weight(self.tensors["packed"], self.tensors["constants"], self.blocksize, self.N, self.K)

    def _lora(self) -> tuple[Tensor | None, Tensor | None, float]:
        return self.tensors["s"], self.tensors["B"], self.scaling

    def poisoned_y(self) -> Tensor:
        return poisoned(self.M, self.gemm_n, dtype=self.dtype)

    def expected(self, *, rounded: bool) -> Expected:
        """Return the expected result with fp32 sums and one rounding. rounded: whether W is rounded to x's dtype."""
        w = exactly(self.weight(nf4.code()).float())
        w = w.to(self.dtype) if rounded else w
        return self._expected(w, self.gemm_k + self.r)

    def expected_of_pairs(self) -> Expected:
        """Return the result with codes rounded to bf16 as linear_nf4_pairs.cu rounds them, and absmax applied in fp32.

        A term is rounded by the sums of its block, by absmax, by the sums of blocks, and by the scale of the codes.
        """
        return self._expected(exactly(self.weight(pair_codes())), self.K + self.r + 4)

    def weight(self, code: Tensor) -> Tensor:
        """Return W [N, K] in float64, for the code's 16 values."""
        n = self.N * self.K
        scale = self.tensors["absmax"].double().repeat_interleave(self.blocksize)[:n]
        return (code.double()[nf4.unpack(self.tensors["packed"], n).long()] * scale).view(self.N, self.K)

    def _expected(self, w: Expected, terms: int) -> Expected:
        """terms: roundings of each term in the fp32 accumulators."""
        t = self.tensors
        y = product(exactly(t["x"]), w if self.transposed else w.T, terms)
        if self.r:
            y = y + product(exactly(t["s"]), exactly(t["B"]).T, terms).scaled(self.scaling)
        if self.bias is not None:
            y = y + exactly(t["bias"])
        return y.to(self.dtype)
