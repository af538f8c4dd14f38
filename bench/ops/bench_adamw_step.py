"""adamw_step: one optimizer step over fp32 parameters by PagedAdamW.step() and its peers.

The two problems are the 448 LoRA factors (r = 16, seven linears in each of 32 layers) of a 7B model, 40 M numbers in
total, and one tensor of 160 M. The optimizers share parameters and gradients, and each has its own states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import qlora_kernels as qk
from qlora_kernels.ops.adamw_step import STATE_BLOCKSIZE

from .. import layers
from ..registry import COLD, Case, Contender, Cost, Suite

HIDDEN, FFN, BLOCKS, RANK = 4096, 11008, 32, 16
LINEARS = ((HIDDEN, HIDDEN),) * 4 + ((FFN, HIDDEN),) * 2 + ((HIDDEN, FFN),)
FACTORS = [shape for N, K in LINEARS * BLOCKS for shape in ((RANK, K), (N, RANK))]
ONE = [(160_000_000,)]
FEW = [(RANK, 576), (576, RANK)] * 60

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

ERROR_FP32 = 1e-6
"""Relative to a step's size: a few roundings to fp32 between two orders of the same operations."""

ERROR_8BIT = 0.1
"""Relative to a step's size: the resolution of the quantized states is a few per cent."""


def shapes(case: Case) -> list[tuple[int, ...]]:
    """Parameter shapes of the case."""
    known: tuple[Sequence[tuple[int, ...]], ...] = (FACTORS, ONE, FEW)
    return list({len(shapes): shapes for shapes in known}[case.tensors])


def cases(device: str) -> Iterator[Case]:
    """Yield many small tensors, one large one, and a hundred tiny ones for the quick run."""
    for problem in (FACTORS, ONE, FEW):
        numel = sum(torch.Size(shape).numel() for shape in problem)
        yield Case(
            "adamw_step",
            N=numel,
            tensors=len(problem),
            label=f"{numel / 1e6:.3g}M",
            dtype=torch.float32,
            device=device,
            quick=problem is FEW,
        )


def cost(case: Case) -> Cost:
    """Return the cost: parameter, gradient and two fp32 states read, all but the gradient written."""
    return Cost(28 * case.N, 0, "copy")


def cost_8bit(case: Case) -> Cost:
    """Return the cost with 8-bit states: per state one byte and 1/256 of a constant, read and written."""
    return Cost(16 * case.N + 16 * case.N // STATE_BLOCKSIZE, 0, "copy")


class Inputs:
    """Parameters with gradients; each optimizer starts from parameters that equal the gradients."""

    def __init__(self, case: Case) -> None:
        self.params = [torch.zeros(shape, device=case.device) for shape in shapes(case)]
        for seed, param in enumerate(self.params):
            param.grad = layers.gaussian(*param.shape, dtype=torch.float32, device=case.device, seed=seed)

    def restart(self) -> None:
        """Reset the parameters to their first values."""
        for param in self.params:
            assert param.grad is not None
            param.copy_(param.grad)


@dataclass(frozen=True)
class Step:
    """A call that steps an optimizer and returns its parameters."""

    optimizer: Optimizer
    params: Sequence[Tensor]

    def __call__(self) -> Sequence[Tensor]:
        self.optimizer.step()
        return self.params


def contender(name: str, make: Callable[..., Optimizer], **options: Any) -> Contender:
    """Return one optimizer. Its states exist once: they exceed every cache, or are in cache during training as well."""

    def build(case: Case, inputs: Inputs, copies: int) -> Sequence[Step]:
        inputs.restart()
        return [Step(make(inputs.params, **HYPERPARAMETERS), inputs.params)]

    return Contender(name, build, lambda case: 8 * case.N, measures=state_bytes, **options)


def state_bytes(case: Case, call: Any) -> dict[str, Any]:
    """Return the bytes of the optimizer's states per parameter element; a storage with several views counts once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in call.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return {"state_bytes_per_element": round(sum(storages.values()) / case.N, 3)}


def bnb(params: Sequence[Tensor], *, bits: int, **hyperparameters: Any) -> Optimizer:
    """Return bitsandbytes' paged AdamW, which pages nothing on a CPU."""
    optimizer: Optimizer = layers.bitsandbytes().optim.PagedAdamW(params, optim_bits=bits, **hyperparameters)
    return optimizer


def verify(case: Case, inputs: Inputs, contender: str, params: Sequence[Tensor]) -> None:
    """Compare the first step with torch's in fp64, on each tensor's first elements."""
    lr, decay = HYPERPARAMETERS["lr"], HYPERPARAMETERS["weight_decay"]
    bound = ERROR_8BIT if "8-bit" in contender else ERROR_FP32
    for param in params[:8]:
        assert param.grad is not None
        grad = param.grad.flatten()[:4096].double()
        update = grad / (grad.abs() + HYPERPARAMETERS["eps"])  # m / sqrt(v) after one step from zero
        expected = grad * (1 - lr * decay) - lr * update
        error = (param.flatten()[:4096].double() - expected).abs().max().item()
        assert error <= lr * bound + 2e-7 * grad.abs().max().item(), f"a parameter is off by {error:.2e}"


SUITE = Suite(
    op="adamw_step",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        contender("ours", qk.PagedAdamW),
        contender("ours 8-bit", qk.PagedAdamW8bit, cost=cost_8bit),
        contender("torch", partial(torch.optim.AdamW, fused=True)),
        contender("bnb", partial(bnb, bits=32), packages=("bitsandbytes",)),
        contender("bnb 8-bit", partial(bnb, bits=8), packages=("bitsandbytes",), cost=cost_8bit),
    ),
    verify=verify,
    modes=(COLD,),
)
