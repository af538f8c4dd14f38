"""quantize_nf4 and quantize_absmax: quantization of weights to double-quantized NF4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.format import double_quant, reference

from .. import layers
from ..registry import Call, Case, Contender, Cost, Suite

SHAPES = ((4096, 4096), (11008, 4096), (576, 576), (1536, 576))

PEER_MISMATCH = 1e-3
"""Share of indices in which a peer may differ: values within an ulp of a boundary, because it divides by absmax."""


def cases(device: str) -> Iterator[Case]:
    """Yield weights in the dtypes of checkpoints."""
    for N, K in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            yield Case("quantize_nf4", N=N, K=K, dtype=dtype, device=device, quick=(N, K) == (1536, 576))


def cost(case: Case) -> Cost:
    """Return the cost: the weight read, its quantized form written."""
    return Cost(layers.dense_bytes(case) + layers.nf4_bytes(case), 0, "copy")


class Inputs:
    """W and its quantized form by the reference."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.w = layers.source_weight(case.N, case.K, case.dtype, case.device)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """Return the reference's packed, absmax_q, absmax_scale and absmax_offset."""
        packed, absmax = reference.quantize_nf4(self.w, self.case.blocksize)
        return packed, *double_quant.quantize_absmax(absmax)


def ours(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of qk.quantize_nf4 with double quantization."""
    return [partial(qk.quantize_nf4, inputs.w.clone(), case.blocksize) for _ in range(copies)]


def bnb(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of bitsandbytes' quantize_4bit with nested statistics."""
    quantize = partial(
        layers.bitsandbytes().functional.quantize_4bit,
        blocksize=case.blocksize,
        compress_statistics=True,
        quant_type="nf4",
    )
    return [partial(quantize, inputs.w.clone()) for _ in range(copies)]


def verify(case: Case, inputs: Inputs, contender: str, result: tuple[Tensor, Any]) -> None:
    """Check our result bit for bit, and a peer's indices up to its rounding at the boundaries."""
    packed, state = result
    expected_packed, *expected_constants = inputs.expected
    if contender == "ours":
        assert torch.equal(packed.flatten(), expected_packed), "packed differs from the reference"
        for actual, expected in zip(state.constants[1:], expected_constants, strict=True):
            assert torch.equal(actual, expected), "a constant differs from the reference"
    else:
        mismatch = (packed.flatten() != expected_packed).float().mean().item()
        assert mismatch <= PEER_MISMATCH, f"{mismatch:.2%} of the packed bytes differ"


SUITE = Suite(
    op="quantize_nf4",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", ours, layers.dense_bytes),
        Contender("bnb", bnb, layers.dense_bytes, packages=("bitsandbytes",)),
    ),
    verify=verify,
)
