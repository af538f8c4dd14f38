"""attention: causal attention with grouped heads, forward and backward of one layer in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import qlora_kernels as qk

from .. import layers
from ..gate import assert_close_to_peer
from ..registry import WARM, Call, Case, Contender, Cost, Suite

LAYERS = {
    "9 heads of 3 x 64, 4 x 256": (4, 9, 3, 256, 64),
    "32 heads of 8 x 64, 1 x 512": (1, 32, 8, 512, 64),
    "32 heads of 8 x 64, 1 x 2048": (1, 32, 8, 2048, 64),
    "32 heads of 8 x 128, 1 x 2048": (1, 32, 8, 2048, 128),
    "4 heads of 2 x 32, 2 x 100": (2, 4, 2, 100, 32),
}
"""Label -> (batch, query heads, key heads, tokens, head dimension) of SmolLM2-135M, Llama 3.2 1B and Llama 3 8B."""


def cases(device: str) -> Iterator[Case]:
    """Yield layers of models, in bf16 and fp32. N and K are the widths of the queries and of the keys."""
    for label, (B, H, KV, T, D) in LAYERS.items():
        for dtype in (torch.bfloat16, torch.float32):
            quick = T == 100 and dtype == torch.bfloat16
            yield Case("attention", B * T, H * D, KV * D, dtype=dtype, device=device, label=label, quick=quick)


def cost(case: Case) -> Cost:
    """Return the cost: all tensors and gradients once; two products forward and five backward, half of each."""
    _, H, _, T, D = LAYERS[case.label]
    return Cost(case.dtype.itemsize * case.M * 4 * (case.N + case.K), 7 * case.M * H * T * D)


def forward_cost(case: Case) -> Cost:
    """Return the cost of the forward alone: q, k, v and out once; half of two products."""
    _, H, _, T, D = LAYERS[case.label]
    return Cost(case.dtype.itemsize * case.M * 2 * (case.N + case.K), 2 * case.M * H * T * D)


class Inputs:
    """q, k, v and grad_out in the memory layout of a model's projections, and the expected results."""

    def __init__(self, case: Case) -> None:
        B, H, KV, T, D = LAYERS[case.label]
        made = [
            layers.gaussian(B * T, heads * D, dtype=case.dtype, device=case.device, seed=seed)
            .view(B, T, heads, D)
            .transpose(1, 2)
            for seed, heads in enumerate((H, KV, KV, H))
        ]
        self.q, self.k, self.v = (tensor.requires_grad_() for tensor in made[:3])
        self.grad_out = made[3]

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """Return (out, grad_q, grad_k, grad_v) in fp32."""
        q, k, v = (t.detach().float().requires_grad_() for t in (self.q, self.k, self.v))
        return step(by_torch, q, k, v, self.grad_out.float())


def by_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return a call of this package's op."""
    return qk.attention(q, k, v)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return a call of torch's scaled_dot_product_attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@torch.enable_grad()
def step(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """Return out, grad_q, grad_k and grad_v of one call."""
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def over(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], *, backward: bool
) -> Callable[[Case, Inputs, int], Sequence[Call]]:
    """Return the calls of an implementation, forward only or with backward."""

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        if backward:
            return step(attend, inputs.q, inputs.k, inputs.v, inputs.grad_out)
        with torch.no_grad():
            return (attend(inputs.q, inputs.k, inputs.v),)

    return lambda case, inputs, copies: [lambda: call(inputs)] * copies


def verify(case: Case, inputs: Inputs, contender: str, result: tuple[Tensor, ...]) -> None:
    """Check the results; the tests hold the op to tighter bounds."""
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, actual, expected in zip(names, result, inputs.expected, strict=False):
        assert_close_to_peer(actual, expected, name=name)


def no_weight(case: Case) -> int:
    """Return nothing, because attention has no weights."""
    return 0


SUITE = Suite(
    op="attention",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", over(by_op, backward=True), no_weight),
        Contender("torch", over(by_torch, backward=True), no_weight),
        Contender("ours, forward", over(by_op, backward=False), no_weight, cost=forward_cost),
        Contender("torch, forward", over(by_torch, backward=False), no_weight, cost=forward_cost),
    ),
    verify=verify,
    modes=(WARM,),
)
