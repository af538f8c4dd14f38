"""linear_nf4 and linear_nf4_grad_x: y = x W^T and grad_x = grad_y W, one frozen layer in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from .. import layers, peers
from ..gate import Expected, arithmetic, assert_close_to_peer, assert_quantizes, assert_within, linear, linear_grad_x
from ..registry import Call, Case, Contender, Cost, Suite
from .bench_linear_nf4 import LLAMA_3_8B, SHAPES

ROWS = (1, 16, 256, 1024)


def cases(device: str) -> Iterator[Case]:
    """Yield all shapes at a few M."""
    for N, K in SHAPES:
        for M in ROWS:
            yield Case("linear_nf4_grad_x", M, N, K, device=device, quick=(N, K) == (1536, 576) and M == 256)
    for N, K in LLAMA_3_8B:
        yield Case("linear_nf4_grad_x", 256, N, K, device=device)


def cost(case: Case) -> Cost:
    """Return the cost: the quantized weight read twice; x and grad_y read, y and grad_x written, once."""
    activations = case.dtype.itemsize * case.M * (case.N + case.K)
    return Cost(2 * (layers.nf4_bytes(case) + activations), 4 * case.M * case.N * case.K)


class Inputs:
    """x [M, K], grad_y [M, N], the dequantized W [N, K], and the expected (y, grad_x)."""

    def __init__(self, case: Case) -> None:
        self.x = layers.gaussian(case.M, case.K, dtype=case.dtype, device=case.device, seed=4).requires_grad_()
        self.grad_y = layers.gaussian(case.M, case.N, dtype=case.dtype, device=case.device, seed=5)
        self.w = layers.dequantized(*case.weight)
        self.arithmetic = arithmetic(case.dtype, case.device)

    @cached_property
    def expected(self) -> tuple[Expected, ...]:
        """Return y and grad_x with the bounds on our errors."""
        y = linear(self.x, self.w, None, self.arithmetic)
        return y, linear_grad_x(self.grad_y, self.w, self.arithmetic)


def forward_backward(layer: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return (y, grad_x) of one layer."""
    y = layer(inputs.x)
    return y.detach(), *torch.autograd.grad(y, inputs.x, inputs.grad_y)


def layer_contender(build_layers: Callable[..., Sequence[nn.Module]]) -> Callable[[Case, Inputs, int], Sequence[Call]]:
    """Return the calls of an implementation that trains through a layer."""

    def build(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
        return [partial(forward_backward, layer, inputs) for layer in build_layers(*case.weight, copies)]

    return build


def verify(case: Case, inputs: Inputs, contender: str, result: tuple[Tensor, Tensor]) -> None:
    """Check both tensors, ours within the tests' bounds, a peer's within its coarser roundings of its own weight."""
    if (own := peers.own_weight(contender, case.weight)) is not None:
        assert_quantizes(own, layers.source_weight(case.N, case.K, case.dtype, case.device))
        assert_close_to_peer(result[0], inputs.x.float() @ own.T, name="y")
        assert_close_to_peer(result[1], inputs.grad_y.float() @ own, name="grad_x")
        return
    for name, actual, expected in zip(("y", "grad_x"), result, inputs.expected, strict=True):
        if contender == "ours":
            assert_within(actual, expected, name)
        else:
            assert_close_to_peer(actual, expected.value, name=name)


SUITE = Suite(
    op="linear_nf4_grad_x",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", layer_contender(layers.ours), layers.nf4_bytes),
        *peers.training_contenders(layer_contender),
    ),
    verify=verify,
)
