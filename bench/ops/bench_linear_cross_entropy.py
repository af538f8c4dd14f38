"""linear_cross_entropy: output head, loss and gradient of the hidden states of one batch, and only the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.training.chunked_loss import ChunkedCrossEntropy

from .. import layers
from ..gate import assert_close_to_peer
from ..registry import WARM, Call, Case, Contender, Cost, Suite

HEADS = {"SmolLM2-135M": (49152, 576, 1024), "llama-1b": (128256, 2048, 512), "tiny": (4000, 128, 64)}
"""Name -> (vocabulary, hidden size, tokens)."""


def cases(device: str) -> Iterator[Case]:
    """Yield heads of models, in bf16 and fp32."""
    for name, (V, K, M) in HEADS.items():
        for dtype in (torch.bfloat16, torch.float32):
            quick = name == "tiny" and dtype == torch.bfloat16
            yield Case("linear_cross_entropy", M, V, K, dtype=dtype, device=device, label=name, quick=quick)


def cost(case: Case) -> Cost:
    """Return the cost: the weight and hidden read once, the gradient written once; two products."""
    item = case.dtype.itemsize
    return Cost(item * (case.N * case.K + 2 * case.M * case.K), 4 * case.M * case.N * case.K)


def loss_cost(case: Case) -> Cost:
    """Return the cost of the loss alone: the weight and hidden read once; one product."""
    return Cost(case.dtype.itemsize * (case.N * case.K + case.M * case.K), 2 * case.M * case.N * case.K)


class Inputs:
    """hidden [M, K], weight [V, K], labels [M], and the expected (loss, grad_hidden)."""

    def __init__(self, case: Case) -> None:
        def made(rows: int, seed: int) -> Tensor:
            return layers.gaussian(rows, case.K, dtype=case.dtype, device=case.device, seed=seed)

        self.hidden = made(case.M, 4).requires_grad_()
        self.weight = made(case.N, 5) / case.K**0.5
        self.labels = torch.arange(case.M, device=case.device) * 31 % case.N

    @cached_property
    @torch.enable_grad()
    def expected(self) -> tuple[Tensor, Tensor]:
        """Return the expected results in fp32, computed a few tokens at a time."""
        weight, losses, gradients = self.weight.float(), [], []
        parts = zip(torch.split(self.hidden.detach(), 64), torch.split(self.labels, 64), strict=True)
        for hidden, labels in parts:
            part = hidden.float().requires_grad_()
            loss = F.cross_entropy(part @ weight.T, labels, reduction="sum")
            gradients.append(torch.autograd.grad(loss, part)[0])
            losses.append(loss.detach())
        return torch.stack(losses).sum(), torch.cat(gradients)


def op_loss(hidden: Tensor, inputs: Inputs) -> Tensor:
    """Return a call of this package's op."""
    return qk.linear_cross_entropy(hidden, inputs.weight, inputs.labels, reduction="sum")


def dense_loss(hidden: Tensor, inputs: Inputs) -> Tensor:
    """Return the loss over the logits of all tokens, as transformers computes it."""
    return F.cross_entropy(F.linear(hidden, inputs.weight).float(), inputs.labels, reduction="sum")


def chunked_loss(hidden: Tensor, inputs: Inputs) -> Tensor:
    """Return the loss of ChunkedLoss on a frozen head."""
    head = torch.nn.Linear(1, 1, bias=False)
    head.weight = torch.nn.Parameter(inputs.weight, requires_grad=False)
    loss: Tensor = ChunkedCrossEntropy.apply(hidden, inputs.labels, head, 256)  # type: ignore[no-untyped-call]
    return loss


def training(loss: Callable[[Tensor, Inputs], Tensor]) -> Callable[[Case, Inputs, int], Sequence[Call]]:
    """Return the calls of an implementation that compute loss and gradient."""

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        value = loss(inputs.hidden, inputs)
        return value.detach(), *torch.autograd.grad(value, inputs.hidden)

    return lambda case, inputs, copies: [lambda: call(inputs)] * copies


def evaluation(loss: Callable[[Tensor, Inputs], Tensor]) -> Callable[[Case, Inputs, int], Sequence[Call]]:
    """Return the calls of an implementation that compute only the loss."""

    def call(inputs: Inputs) -> tuple[Tensor]:
        with torch.no_grad():
            return (loss(inputs.hidden, inputs),)

    return lambda case, inputs, copies: [lambda: call(inputs)] * copies


def verify(case: Case, inputs: Inputs, contender: str, result: tuple[Tensor, ...]) -> None:
    """Check the results; the tests hold the op to tighter bounds."""
    for name, actual, expected in zip(("loss", "grad_hidden"), result, inputs.expected, strict=False):
        assert_close_to_peer(actual, expected, name=name)


SUITE = Suite(
    op="linear_cross_entropy",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", training(op_loss), layers.dense_bytes),
        Contender("ChunkedLoss", training(chunked_loss), layers.dense_bytes),
        Contender("logits", training(dense_loss), layers.dense_bytes),
        Contender("ours, loss alone", evaluation(op_loss), layers.dense_bytes, cost=loss_cost),
        Contender("logits, loss alone", evaluation(dense_loss), layers.dense_bytes, cost=loss_cost),
    ),
    verify=verify,
    modes=(WARM,),
)
