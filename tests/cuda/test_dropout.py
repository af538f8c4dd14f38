"""csrc/cuda/dropout.cu in the emulator: the mask of ops/philox.py bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora_kernels.ops.philox import dropout_keep, dropped, keep_scale, keep_threshold
from tests.support.problems import gaussian

from .launch_args import dropout_args
from .launching import (
    FLOAT_TYPES,
    all_modes,
    library,
    needs_emulator,
    needs_nvcc,
    over_schedules,
    poisoned,
    ptx_under_sanitizers,
    same_bits,
)

pytestmark = needs_emulator

SEEDS = (7, -3, 0x1234567890ABCDEF)
SIZES = (1, 8, 2053, 4096)
"""One element, one Philox call, a tail after two blocks, whole blocks."""


def launch(mode: str, x: torch.Tensor, p: float, seed: int, add_to: torch.Tensor | None) -> torch.Tensor:
    """Return the launcher's y, equal in every schedule of `mode`."""

    def run(order: str, schedule_seed: int) -> tuple[torch.Tensor]:
        y = poisoned(*x.shape, dtype=x.dtype) if add_to is None else add_to.clone()
        drawn = (keep_threshold(p), float(keep_scale(p)), add_to is not None, torch.tensor([seed]))
        tested = library("dropout", mode)
        assert tested.call("launch_dropout", dropout_args(x, y, *drawn), None, seed=schedule_seed, order=order) == 0
        return (y,)

    return over_schedules(mode, run)[0]


@all_modes
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_equals_the_definition(mode: str, dtype: torch.dtype, n: int) -> None:
    x = gaussian(n, dtype=dtype)
    for p, seed in zip((0.1, 0.5, 0.999), SEEDS, strict=True):
        expected = dropped(x.view(1, n), torch.tensor([seed]), p).view(n)
        assert same_bits(launch(mode, x, p, seed, None), expected)


@all_modes
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_adds_with_one_rounding(mode: str, dtype: torch.dtype) -> None:
    n, p, seed = 2053, 0.3, 11
    x, y = gaussian(n, dtype=dtype), gaussian(n, seed=1, dtype=dtype)
    keep = dropout_keep(torch.tensor([seed]), 1, n, p).view(n)
    scaled = torch.where(keep, x.float() * torch.tensor(keep_scale(p)), 0.0)
    assert same_bits(launch(mode, x, p, seed, y), (y.float() + scaled).to(dtype))


def test_different_seeds_give_different_masks() -> None:
    masks = [launch("plain", torch.ones(2048), 0.5, seed, None) for seed in SEEDS]
    assert all((a != b).float().mean() > 0.4 for a, b in itertools.pairwise(masks))


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    test_equals_the_definition(mode, torch.bfloat16, 2053)
