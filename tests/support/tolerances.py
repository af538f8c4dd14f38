"""Every bound on a numerical error in the test-suite, with the sentence that justifies it."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
"""A kernel may err twice as much as torch's composition at the same dtype: its sums run in another order."""

GRADIENT_FACTOR = 3.0
"""Gradients chain two such products, each with its own roundings."""


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of `dtype` at |value|."""
    return torch.finfo(dtype).eps * 2.0 ** torch.tensor(max(value, torch.finfo(dtype).tiny)).log2().floor().item()


def assert_within_baseline(
    actual: Tensor, composed: Tensor, exact: Tensor, *, factor: float, name: str = "result"
) -> None:
    """max|actual - exact| <= factor * max|composed - exact| + one ulp at max|exact|.

    actual: the kernel's result.   composed: torch's, from the same inputs in the same dtype.   exact: in float64.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual.double() - exact).abs().max().item()
    baseline = (composed.double() - exact).abs().max().item()
    bound = factor * baseline + ulp(exact.abs().max().item(), actual.dtype)
    assert error <= bound, f"{name}: error {error:.3e} exceeds {factor} x baseline {baseline:.3e} + ulp = {bound:.3e}"
