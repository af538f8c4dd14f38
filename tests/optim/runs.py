"""Training runs that tests compare: fixed parameters and gradients, any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from qlora_kernels.backends.reference.adamw_step import fma

SHAPES = ((7,), (64, 130), (5003,), (3, 3, 5), (), (0, 4), (96, 256))


class DefinedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the arithmetic of ops/adamw_step.py, tensor by tensor.

    Torch's fused kernel computes the same bits only on CPUs for which it is compiled with fused multiply-adds, and
    there only in whole vectors; its other paths take square roots from MKL.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: torch.Tensor, g: torch.Tensor, group: dict[str, Any]) -> None:
        state, rate, (beta1, beta2) = self.state[p], float(group["lr"]), group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        t, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
        p.mul_(1 - rate * group["weight_decay"])
        weight = torch.tensor(1 - beta1, dtype=torch.float32)
        m.copy_(fma(weight, g - m, m) if weight < 0.5 else fma(weight - 1, g - m, g))
        v.copy_(fma(g * (1 - beta2), g, v * beta2))
        root = v.double().sqrt().float()
        denominator = root / (1 - beta2**t) ** 0.5 + group["eps"]
        p.add_(m * -(rate / (1 - beta1**t)) / denominator)


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    """Return parameters with the same values in every call."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int, *, missing: bool = False) -> None:
    """Set the gradients of step `step`, over four decades of magnitude; every third step omits one if `missing`."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator) * 10.0 ** (index % 4 - 3)
        param.grad = None if missing and (step + index) % 3 == 0 else grad.to(param.dtype)


def run(
    make: Callable[[list[nn.Parameter]], Optimizer],
    steps: int,
    *,
    dtype: torch.dtype = torch.float32,
    missing: bool = False,
    params: list[nn.Parameter] | None = None,
    first: int = 0,
) -> tuple[list[nn.Parameter], Optimizer]:
    """Run `steps` steps, starting with number `first`."""
    params = parameters(dtype) if params is None else params
    optimizer = make(params)
    for step in range(first, first + steps):
        set_gradients(params, step, missing=missing)
        optimizer.step()
    return params, optimizer


def assert_same(actual: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    """Assert that two lists of parameters are equal bit for bit."""
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"parameter {index}: {(a != b).sum()} of {a.numel()} elements differ"


def assert_same_states(actual: Optimizer, expected: Optimizer) -> None:
    """Assert that every state in the two state_dicts is equal bit for bit."""
    left, right = actual.state_dict()["state"], expected.state_dict()["state"]
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].keys() == right[key].keys()
        for name in left[key]:
            assert torch.equal(left[key][name], right[key][name]), (key, name)


def groups(params):
    """Return two parameter groups with settings of their own."""
    return [
        {"params": params[:3], "lr": 3e-3, "betas": (0.8, 0.95)},
        {"params": params[3:], "weight_decay": 0.0, "eps": 1e-6},
    ]
