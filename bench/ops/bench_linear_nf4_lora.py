"""linear_nf4_lora and its backward: a frozen layer with LoRA in a training step, all four results.

In ours the masters of the factors are fp32. PEFT runs in its fastest setting, with bf16 factors, and once with the fp32
factors that get_peft_model makes by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels import LinearNF4
from qlora_kernels.ops.linear_nf4_lora import draw_seed
from qlora_kernels.ops.philox import dropout_keep, keep_scale

from .. import layers, peers
from ..gate import Dropout, Expected, assert_close_to_peer, assert_within, lora_backward, lora_down, lora_forward
from ..registry import GATE_SEED, Call, Case, Contender, Cost, Suite
from . import bench_linear_nf4_grad_x as plain
from .bench_linear_nf4 import LLAMA_3_8B, SHAPES

ROWS = (256, 1024)
RANK = 16
RESULTS = ("y", "grad_x", "grad_A", "grad_B")


def cases(device: str) -> Iterator[Case]:
    """Yield all shapes at two M, with and without dropout."""
    for N, K in SHAPES:
        for M in ROWS:
            for dropout in (0.0, 0.05):
                quick = (N, K) == (1536, 576) and M == 256
                yield Case("linear_nf4_lora", M, N, K, RANK, dropout, device=device, quick=quick)
    for N, K in LLAMA_3_8B:
        yield Case("linear_nf4_lora", 256, N, K, RANK, device=device)


def cost(case: Case) -> Cost:
    """Return the plain layer's cost, one more read of x, and six products with the factors."""
    base = plain.cost(case)
    factors = 4 * case.r * (case.N + case.K)
    more_x = case.dtype.itemsize * case.M * case.K
    return Cost(base.bytes + 3 * factors + more_x, base.flops + 6 * case.M * case.r * (case.N + case.K))


class Inputs(plain.Inputs):
    """The plain layer's inputs, factors, and the expected (y, grad_x, grad_A, grad_B)."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.case = case
        self.scaling = layers.LORA_ALPHA / case.r
        self.lora_A, self.lora_B = (factor.requires_grad_() for factor in layers.lora_factors(case))

    @cached_property
    def dropout(self) -> Dropout | None:
        """Return the dropout mask that is drawn with GATE_SEED."""
        if self.case.dropout == 0:
            return None
        with torch.random.fork_rng():
            torch.manual_seed(GATE_SEED)
            seed = draw_seed(self.x.device)
        keep = dropout_keep(seed, self.case.M, self.case.K, self.case.dropout)
        return Dropout(keep, keep_scale(self.case.dropout))

    @cached_property
    def expected(self) -> tuple[Expected, ...]:
        """Return the results with the bounds on our errors."""
        factors, scaling, kind = (self.lora_A, self.lora_B), self.scaling, self.arithmetic
        s = lora_down(self.x, self.lora_A, self.dropout, kind)
        y = lora_forward(self.x, self.w, None, s, self.lora_B, scaling, kind)
        return y, *lora_backward(self.grad_y, self.x, s, self.w, *factors, scaling, self.dropout, kind)


def ours(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of LinearNF4.forward_lora and its backward."""

    def call(layer: LinearNF4) -> tuple[Tensor, ...]:
        y = layer.forward_lora(inputs.x, inputs.lora_A, inputs.lora_B, inputs.scaling, case.dropout)
        gradients = torch.autograd.grad(y, (inputs.x, inputs.lora_A, inputs.lora_B), inputs.grad_y)
        return y.detach(), *gradients

    return [partial(call, layer) for layer in layers.ours(*case.weight, copies)]


def unsloth_style(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of Unsloth's algorithm: decode into a shared buffer, multiply, and addmm for the update."""

    def call(layer: peers.UnslothStyle) -> tuple[Tensor, ...]:
        y = layer.forward_lora(inputs.x, inputs.lora_A, inputs.lora_B, inputs.scaling)
        gradients = torch.autograd.grad(y, (inputs.x, inputs.lora_A, inputs.lora_B), inputs.grad_y)
        return y.detach(), *gradients

    return [partial(call, layer) for layer in peers.unsloth_style(*case.weight, copies)]


def has_no_dropout(case: Case) -> bool:
    """Whether the case is one that Unsloth's fused path supports, with the further peers' layers."""
    return peers.for_context(case) and case.dropout == 0


def through_peft(stack: Sequence[nn.Module], case: Case, inputs: Inputs, adapter_dtype: torch.dtype) -> Sequence[Call]:
    """Build calls of Hugging Face PEFT around the layers of `stack`."""

    def call(layer: Any) -> tuple[Tensor, ...]:
        y = layer(inputs.x)
        factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return y.detach(), *torch.autograd.grad(y, (inputs.x, *factors), inputs.grad_y)

    return [partial(call, layer) for layer in layers.with_peft(stack, case, adapter_dtype)]


def bnb_peft(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of PEFT over bitsandbytes with factors in the dtype of x."""
    return through_peft(layers.bitsandbytes_train(*case.weight, copies), case, inputs, case.dtype)


def bnb_peft_fp32(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of PEFT over bitsandbytes with fp32 factors."""
    return through_peft(layers.bitsandbytes_train(*case.weight, copies), case, inputs, torch.float32)


def dense_peft(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of PEFT over dense layers."""
    return through_peft(layers.dense(*case.weight, copies), case, inputs, case.dtype)


def verify(case: Case, inputs: Inputs, contender: str, result: tuple[Tensor, ...]) -> None:
    """Check all results, except a peer's with dropout, whose mask cannot be drawn again; it is checked without."""
    if contender == "ours without LoRA":
        y, grad_x = result
        plain.verify(case, plain.Inputs(case), "ours", (y, grad_x))
        return
    for name, actual, expected in zip(RESULTS, result, inputs.expected, strict=True):
        if contender == "ours":
            assert_within(actual, expected, name)
        elif case.dropout == 0:
            assert_close_to_peer(actual, expected.value, name=name)


OVER_BITSANDBYTES: dict[str, Any] = {
    "applies": layers.blocks_end_with_rows,
    "packages": ("bitsandbytes", "peft"),
}
"""Where PEFT over bitsandbytes runs."""


SUITE = Suite(
    op="linear_nf4_lora",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", ours, layers.nf4_bytes),
        Contender("ours without LoRA", plain.layer_contender(layers.ours), layers.nf4_bytes),
        Contender("bnb + PEFT", bnb_peft, layers.nf4_bytes, **OVER_BITSANDBYTES),
        Contender("bnb + PEFT fp32", bnb_peft_fp32, layers.nf4_bytes, **OVER_BITSANDBYTES),
        Contender("Unsloth-style", unsloth_style, layers.nf4_bytes, applies=has_no_dropout),
        Contender("dense + PEFT", dense_peft, layers.dense_bytes, packages=("peft",)),
    ),
    verify=verify,
)
