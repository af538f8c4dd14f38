"""Training runs that tests compare: fixed parameters and gradients, any optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

SHAPES = ((7,), (64, 130), (5003,), (3, 3, 5), (), (0, 4), (96, 256))

WHOLE_VECTORS = ((16,), (64, 130), (5008,), (3, 16, 5), (0, 4), (96, 256))
"""Multiples of 16 elements: what remains beyond those, torch's fused kernel rounds in another order."""


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    """Of the same values in every call."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int, *, missing: bool = False) -> None:
    """Gradients of step number `step`, over four decades of magnitude; every third step one is None if `missing`."""
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
    """`steps` steps from number `first` on."""
    params = parameters(dtype) if params is None else params
    optimizer = make(params)
    for step in range(first, first + steps):
        set_gradients(params, step, missing=missing)
        optimizer.step()
    return params, optimizer


def assert_same(actual: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    """Bit for bit."""
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"parameter {index}: {(a != b).sum()} of {a.numel()} elements differ"


def assert_same_states(actual: Optimizer, expected: Optimizer) -> None:
    """Every state in the two state_dicts, bit for bit."""
    left, right = actual.state_dict()["state"], expected.state_dict()["state"]
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].keys() == right[key].keys()
        for name in left[key]:
            assert torch.equal(left[key][name], right[key][name]), (key, name)
