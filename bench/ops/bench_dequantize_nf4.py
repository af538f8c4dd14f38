"""dequantize_nf4: dequantization of a double-quantized weight to bf16, into a reused and into a new buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qlora_kernels as qk

from .. import layers
from ..registry import Call, Case, Contender, Cost, Suite
from .bench_linear_nf4 import SHAPES


def cases(device: str) -> Iterator[Case]:
    """Yield a case for each shape of the weight."""
    for N, K in SHAPES:
        yield Case("dequantize_nf4", N=N, K=K, device=device, quick=(N, K) == (1536, 576))


def cost(case: Case) -> Cost:
    """Return the cost: the quantized weight read, the dense one written."""
    return Cost(layers.nf4_bytes(case) + layers.dense_bytes(case), 0, "copy")


def reused(case: Case) -> Tensor:
    """Return the buffer that all calls of an implementation write."""
    return torch.zeros(case.N, case.K, dtype=case.dtype, device=case.device)


def ours(case: Case, inputs: Tensor, copies: int) -> Sequence[Call]:
    """Build calls that dequantize into one reused tensor."""
    out = reused(case)
    return [
        partial(qk.dequantize_nf4, layer.packed, layer.quant_state, out=out)
        for layer in layers.ours(*case.weight, copies)
    ]


def ours_fresh(case: Case, inputs: Tensor, copies: int) -> Sequence[Call]:
    """Build calls that dequantize into a new tensor each."""
    return [partial(qk.dequantize_nf4, layer.packed, layer.quant_state) for layer in layers.ours(*case.weight, copies)]


def bnb(case: Case, inputs: Tensor, copies: int) -> Sequence[Call]:
    """Build calls of bitsandbytes, which on a CPU has no out argument and always fills a new tensor."""
    out = None if case.device == "cpu" else reused(case)
    dequantize = layers.bitsandbytes().functional.dequantize_4bit
    weights: list[Any] = [layer.weight for layer in layers.bitsandbytes_train(*case.weight, copies)]
    return [partial(dequantize, weight, weight.quant_state, out=out) for weight in weights]


def verify(case: Case, inputs: Tensor, contender: str, w: Tensor) -> None:
    """Check the decoded weight against the reference: ours bit for bit, peers in 99 % of the weights."""
    differing = int((w != inputs).sum())
    allowed = 0 if contender.startswith("ours") else inputs.numel() // 100
    assert differing <= allowed, f"{differing} of {inputs.numel()} weights differ from the reference"


SUITE = Suite(
    op="dequantize_nf4",
    cases=cases,
    cost=cost,
    inputs=lambda case: layers.dequantized(*case.weight),
    contenders=(
        Contender("ours", ours, layers.nf4_bytes),
        Contender("bnb", bnb, layers.nf4_bytes, applies=layers.blocks_end_with_rows, packages=("bitsandbytes",)),
        Contender("ours, fresh output", ours_fresh, layers.nf4_bytes),
    ),
    verify=verify,
)
