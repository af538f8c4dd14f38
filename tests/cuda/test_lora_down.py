"""csrc/cuda/lora_down.cu in the emulator: s against float64 (class 2), and the copy of x bit for bit (class 1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_kernels.ops.philox import dropout_keep, keep_scale, keep_threshold
from tests.support import cuda_host
from tests.support.linear_formulas import Arithmetic, Dropout, lora_down
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within

from .launch_args import lora_down_args, rows_memory
from .launching import (
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

CASES = [
    # (M, K, r, dropout, copies): partial tiles of rows, of the contraction and of the rank; one warp at work and all,
    # twice
    (1, 8, 1, 0.0, True),
    (16, 64, 16, 0.3, True),
    (37, 1112, 5, 0.3, True),
    (17, 520, 24, 0.0, False),
    (35, 96, 64, 0.5, True),
    (5, 584, 40, 0.0, True),
]


Case = tuple[int, int, int, float, bool]


def run(
    tested: cuda_host.Library, case: Case, dtype: torch.dtype, mode: str = ""
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Return (s, the operand that holds the copy, x, lora_A, seed). mode: "plain" runs every schedule."""
    M, K, r, p, copies = case
    x, lora_A, seed = gaussian(M, K, dtype=dtype), gaussian(r, K, seed=1, dtype=dtype), torch.tensor([2**40 + 3])

    def launch(order: str, schedule: int) -> tuple[Tensor, ...]:
        wide, both = poisoned(M, r + 3, dtype=dtype), poisoned(M, K + 16, dtype=dtype)
        copied = rows_memory(both[:, :K]) if copies else (None, 0)
        drawn = (seed, keep_threshold(p), float(keep_scale(p))) if p else (None, 0, 1.0)
        arguments = lora_down_args(x, lora_A, drawn, rows_memory(wide[:, 3:]), copied)
        assert tested.call("launch_lora_down", arguments, None, seed=schedule, order=order) == 0
        return wide, both

    wide, both = over_schedules(mode, launch)
    assert same_bits(wide[:, :3].contiguous(), poisoned(M, 3, dtype=dtype)), "written outside s"
    return wide[:, 3:], both if copies else None, x, lora_A, seed


@all_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("M", "K", "r", "p", "copies"), CASES)
def test_s_and_copy(mode: str, M: int, K: int, r: int, p: float, copies: bool, dtype: torch.dtype) -> None:
    check_s_and_copy(library("lora_down", mode), (M, K, r, p, copies), dtype, mode)


def check_s_and_copy(tested: cuda_host.Library, case: Case, dtype: torch.dtype, mode: str = "") -> None:
    M, K, _, p, _ = case
    s, both, x, lora_A, seed = run(tested, case, dtype, mode)
    dropout = Dropout(dropout_keep(seed, M, K, p), keep_scale(p)) if p else None
    assert_within(s, lora_down(x, lora_A, dropout, Arithmetic(dtype, composed=False)), "s")
    if both is not None:
        assert same_bits(both[:, :K].contiguous(), x)
        assert same_bits(both[:, K:].contiguous(), poisoned(M, 16, dtype=dtype)), "written beside the copy"


def test_dropped_elements_do_not_matter() -> None:
    """An infinite x that dropout drops leaves s finite, as in ops/philox.py, and is copied."""
    M, K, p, dtype = 16, 64, 0.5, torch.bfloat16
    x, seed = gaussian(M, K, dtype=dtype), torch.tensor([5])
    x[~dropout_keep(seed, M, K, p)] = torch.inf
    s, both = poisoned(M, 4, dtype=dtype), poisoned(M, K, dtype=dtype)
    drawn = (seed, keep_threshold(p), float(keep_scale(p)))
    arguments = lora_down_args(x, gaussian(4, K, dtype=dtype), drawn, rows_memory(s), rows_memory(both))
    assert library("lora_down", "plain").call("launch_lora_down", arguments, None) == 0
    assert s.isfinite().all()
    assert same_bits(both, x)


FAULTS = [
    Fault("the stride of the copy", "row * args.copy_stride + column", "row * args.K + column", 1),
    Fault("the Philox call of a column", "(row * args.K + column) >> 3", "(row * args.K) >> 3", 1),
    Fault("the rows of lora_A", "int64_t(j) * args.K + column", "int64_t(g) * args.K + column", 3),
    Fault("the warps that are added", "w < kDownWarps", "w < kDownWarps / 2", 2),
    Fault("the scale of dropout", "__fmul_rn(total, args.scale)", "total", 1),
    Fault("the row of a sum", "g + i / 2 * 8", "g", 1),
    Fault("the next step of a warp", "k + kDownWarps * kDownStep", "k", 2),
    Fault("the rows past the end", "m >= args.M || column >= args.r", "column >= args.r", 2),
]


ONE_DTYPE = {"launch_typed<T>(*args": "launch_typed<__nv_bfloat16>(*args"}
"""Leaves the kernels that the test runs, because compiling takes most of its time."""


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "lora_down", FAULTS, lambda tested, case: check_s_and_copy(tested, CASES[case], torch.bfloat16), ONE_DTYPE
)


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    test_s_and_copy(mode, *CASES[2], torch.bfloat16)


@pytest.mark.parametrize(
    ("K", "r", "dtype"), [(64, 65, torch.bfloat16), (12, 4, torch.float16), (64, 4, torch.float32)]
)
def test_unsupported_problems_are_refused(K: int, r: int, dtype: torch.dtype) -> None:
    x, s = gaussian(3, K, dtype=dtype), poisoned(3, r, dtype=dtype)
    arguments = lora_down_args(x, gaussian(r, K, dtype=dtype), (None, 0, 1.0), rows_memory(s), (None, 0))
    assert library("lora_down", "plain").call("launch_lora_down", arguments, None) == 1
