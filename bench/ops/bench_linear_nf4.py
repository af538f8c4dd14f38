"""linear_nf4: y = x W^T, the forward of a frozen layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from .. import layers, peers
from ..gate import Expected, arithmetic, assert_close_to_peer, assert_quantizes, assert_within, linear
from ..limits import limit
from ..registry import Call, Case, Contender, Cost, Suite

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576), (1536, 576), (576, 1536))
"""(N, K) of Llama 2 7B and SmolLM2-135M."""

LLAMA_3_8B = ((1024, 4096), (14336, 4096), (4096, 14336))
"""(N, K) of Llama 3 8B, in addition to 4096 x 4096."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FEWER_ROWS = (1, 4, 16, 64, 256, 1024)
FORCED_ISAS = ("avx512", "avx2", "portable")
LIMITED_SHAPES = ((4096, 4096), (1536, 576), (576, 1536), (576, 576))
LIMITED_ROWS = (64, 256, 1024)
"""Shapes and M of runs under a limit (bench/limits.py), in fp32 and bf16."""


def cases(device: str) -> Iterator[Case]:
    """Yield all shapes at all M in bf16, and fp32 on each instruction set at an M bound by arithmetic.

    Under a limit (bench/limits.py), yield a few shapes in fp32 and bf16.
    """
    if limit() is not None:
        for N, K in LIMITED_SHAPES:
            for M in LIMITED_ROWS:
                for dtype in (torch.float32, torch.bfloat16):
                    yield Case("linear_nf4", M, N, K, dtype=dtype, device=device)
        return
    for N, K in SHAPES:
        for M in ROWS:
            yield Case("linear_nf4", M, N, K, device=device, quick=(N, K) == (1536, 576) and M in (1, 16, 256))
    for N, K in LLAMA_3_8B:
        for M in FEWER_ROWS:
            yield Case("linear_nf4", M, N, K, device=device)
    for N, K in ((4096, 4096), (576, 1536)):
        yield Case("linear_nf4", 4096, N, K, device=device)
    if device == "cpu":
        for isa in (None, *FORCED_ISAS):
            yield Case("linear_nf4", 256, 4096, 4096, dtype=torch.float32, isa=isa)


def cost(case: Case) -> Cost:
    """Return the cost: the quantized weight and x read once, y written once."""
    activations = case.dtype.itemsize * case.M * (case.N + case.K)
    return Cost(layers.nf4_bytes(case) + activations, 2 * case.M * case.N * case.K)


class Inputs:
    """x [M, K], the dequantized W [N, K], and the expected y."""

    def __init__(self, case: Case) -> None:
        self.x = layers.gaussian(case.M, case.K, dtype=case.dtype, device=case.device, seed=4)
        self.w = layers.dequantized(*case.weight)
        self.arithmetic = arithmetic(case.dtype, case.device)

    @cached_property
    def expected(self) -> Expected:
        """Return y with the bound on our error."""
        return linear(self.x, self.w, None, self.arithmetic)


def layer_contender(build_layers: Callable[..., Sequence[nn.Module]]) -> Callable[[Case, Inputs, int], Sequence[Call]]:
    """Return the calls of a layer. Nothing requires a gradient, so that no graph is built."""

    def build(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
        return [partial(layer, inputs.x) for layer in build_layers(*case.weight, copies)]

    return build


def verify(case: Case, inputs: Inputs, contender: str, y: Tensor) -> None:
    """Check our result within the tests' bounds, and a peer's within its coarser roundings of its own weight."""
    if contender.startswith("ours"):
        assert_within(y, inputs.expected, "y")
    elif (own := peers.own_weight(contender, case.weight)) is not None:
        assert_quantizes(own, layers.source_weight(case.N, case.K, case.dtype, case.device))
        assert_close_to_peer(y, inputs.x.float() @ own.T, name="y")
    else:
        assert_close_to_peer(y, inputs.expected.value, name="y")


def scales_with_threads(case: Case) -> bool:
    """Whether the case is one in which one thread is compared with all."""
    return case.device == "cpu" and case.M == 256 and case.N >= 4096 and case.dtype == torch.bfloat16


def has_fused_bitsandbytes(case: Case) -> bool:
    """Whether bitsandbytes' fused CPU kernel, which computes only in bf16, supports the case."""
    return layers.blocks_end_with_rows(case) and case.dtype == torch.bfloat16


SUITE = Suite(
    op="linear_nf4",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", layer_contender(layers.ours), layers.nf4_bytes),
        Contender(
            "bnb eval",
            layer_contender(layers.bitsandbytes_eval),
            layers.nf4_bytes,
            applies=has_fused_bitsandbytes,
            packages=("bitsandbytes",),
        ),
        *peers.training_contenders(layer_contender),
        Contender("torch int8", layer_contender(peers.int8), peers.int8_bytes, applies=peers.for_context),
        Contender(
            "oneDNN int8",
            layer_contender(peers.onednn_int8),
            peers.int8_bytes,
            applies=lambda case: peers.for_context(case) and peers.has_integer_products(case),
        ),
        Contender("torch int4", layer_contender(peers.int4), peers.int4_bytes, applies=peers.for_context),
        Contender(
            "ours, 1 thread", layer_contender(layers.ours), layers.nf4_bytes, applies=scales_with_threads, threads=1
        ),
    ),
    verify=verify,
)
