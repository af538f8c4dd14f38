"""csrc/cuda/dropout.cu in the emulator: the mask of ops/philox.py bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qlora_kernels.ops.philox import DRAW_BITS, dropout_keep, dropped, keep_scale, keep_threshold, philox
from tests.support import cuda_host
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
from .planted import Fault, planted_tests

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
    assert same_bits(launch(mode, x, p, seed, y), sum_of(y, x, p, seed))


def sum_of(y: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """Return y + dropout(x), rounded once."""
    keep = dropout_keep(torch.tensor([seed]), 1, x.numel(), p).view(-1)
    return (y.float() + torch.where(keep, x.float() * torch.tensor(keep_scale(p)), 0.0)).to(y.dtype)


def test_different_seeds_give_different_masks() -> None:
    masks = [launch("plain", torch.ones(2048), 0.5, seed, None) for seed in SEEDS]
    assert all((a != b).float().mean() > 0.4 for a, b in itertools.pairwise(masks))


@dataclass(frozen=True)
class Drawn:
    """One call. shifts: the elements of the memory of x and of y before their first one.   add: to y."""

    n: int
    add: bool
    dtype: torch.dtype = torch.bfloat16
    p: float = 0.3
    seed: int = SEEDS[2]
    shifts: tuple[int, int] = (0, 0)

    def check(self, tested: cuda_host.Library) -> None:
        """Compare y with the definition, and the elements before y with what they were."""
        in_x, in_y = self.shifts
        x = gaussian(self.n + in_x, dtype=self.dtype)[in_x:]
        memory = gaussian(self.n + in_y, seed=1, dtype=self.dtype)
        y, before = memory[in_y:], memory.clone()
        zeros = torch.zeros(self.n, dtype=self.dtype)
        before[in_y:] = sum_of(y if self.add else zeros, x, self.p, self.seed)
        drawn = (keep_threshold(self.p), float(keep_scale(self.p)), self.add, torch.tensor([self.seed]))
        assert tested.call("launch_dropout", dropout_args(x, y, *drawn), None) == 0
        assert same_bits(memory, before)


@all_modes
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shifts", [(1, 0), (0, 1)], ids=str)
def test_memory_may_begin_at_any_element(mode: str, dtype: torch.dtype, shifts: tuple[int, int]) -> None:
    """x or y does not begin at a 16-byte boundary, for which the kernel has an instance."""
    for add in (False, True):
        Drawn(261, add, dtype, shifts=shifts).check(library("dropout", mode))


def a_draw(place: int) -> float:
    """Return the dropout probability whose threshold is one of the first draws of SEEDS[2]."""
    words = philox(SEEDS[2], torch.tensor([0]))[0]
    return int(words[place // 2] >> 16 * (place % 2) & 0xFFFF) / 2**DRAW_BITS


PLANTED_IN = [
    Drawn(4096, add=False),  # whole blocks
    Drawn(2053, add=False),  # a tail
    Drawn(2053, add=True),
    Drawn(261, add=True, shifts=(0, 1)),
    Drawn(16, add=False, p=a_draw(3)),
    Drawn(0, add=False),
    replace(Drawn(2053, add=True), dtype=torch.float32),
    Drawn(261, add=False, shifts=(1, 0)),
]


@pytest.mark.parametrize("case", [4, 5], ids=["threshold", "empty"])
def test_a_draw_equal_to_the_threshold_and_no_elements(case: int) -> None:
    """A draw that equals the threshold is kept, and nothing is launched for no elements."""
    PLANTED_IN[case].check(library("dropout", "plain"))


DRAW = "(word[j / 2] >> (16 * (j & 1)) & 0xFFFFu)"
FAULTS = [
    Fault("the call of a thread", "int64_t(blockIdx.x) * kDropoutThreads + threadIdx.x", "int64_t(threadIdx.x)", 0),
    Fault("the elements of a call", "call * kDrawsPerCall", "call * (kDrawsPerCall - 1)", 0),
    Fault("the seed", "*seed", "int64_t(0)", 0),
    Fault("the counter", "philox(seed, call)", "philox(seed, 0)", 0),
    Fault("the high word of the seed", "static_cast<uint32_t>(seed >> 32)", "0u", 0),
    Fault("the rounds", "round < 10", "round < 9", 0),
    Fault("the second key", "key1 += kWeyl1;", "", 0),
    Fault("a draw equal to the threshold", f"{DRAW} >= threshold", f"{DRAW} > threshold", 4),
    Fault("the half of a word", "16 * (j & 1)", "16 * (1 - (j & 1))", 0),
    Fault("the word of a draw", "word[j / 2]", "word[j % 4]", 0),
    Fault("the last group", "ALIGNED && first + kDrawsPerCall <= numel", "ALIGNED", 1),
    Fault("the alignment of y", "is_aligned(args.y, 16)", "true", 3),
    Fault("the alignment of x", "is_aligned(args.x, 16)", "true", 7),
    Fault("the scale of a group", "__fmul_rn(value[j], scale)", "value[j]", 0),
    Fault("the x of a group", "load8(value, x + first);", "load8(value, x);", 0),
    Fault("the sum of a group", "load8(sum, y + first);", "", 2),
    Fault("two roundings", "__fadd_rn(sum[j], scaled)", "__fadd_rn(sum[j], to_float(round_to<T>(scaled)))", 2),
    Fault("the y of a group", "store8(y + first, sum);", "store8(y, sum);", 0),
    Fault("past the group", "j < kDrawsPerCall && first + j < numel", "first + j < numel", 3),
    Fault("the end of the tail", "first + j < numel", "first + j < numel - 1", 1),
    Fault("the scale of the tail", "__fmul_rn(to_float(x[first + j]), scale)", "to_float(x[first + j])", 1),
    Fault("the sum of the tail", "__fadd_rn(to_float(y[first + j]), scaled)", "scaled", 3),
    Fault("the blocks", "int64_t{kDropoutThreads} * kDrawsPerCall", "int64_t{2 * kDropoutThreads} * kDrawsPerCall", 0),
    Fault("the instance that adds", "args.add", "false", 2),
    Fault("no elements", "args->numel == 0", "false", 5),
    Fault("the second pair", "pack_pair<T>(from[2], from[3])", "pack_pair<T>(from[3], from[2])", 0),
    Fault("the low half of a pair", "to[2 * i] = pair.x;", "to[2 * i] = pair.y;", 0),
    Fault("the last of four", "to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;", "to[4] = high.x;", 6),
]
"""Faults in the kernel, philox.cuh and floats.cuh; case: in PLANTED_IN."""


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "dropout", FAULTS, lambda tested, case: PLANTED_IN[case].check(tested), headers=("philox.cuh", "floats.cuh")
)


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    test_equals_the_definition(mode, torch.bfloat16, 2053)
