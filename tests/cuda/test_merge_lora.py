"""csrc/cuda/merge_lora.cu in the emulator, against float64 (class 2)."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.format import reference
from tests.support import cuda_host
from tests.support.linear_formulas import Arithmetic, merged_weight
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within

from .launch_args import merge_lora_args, nf4_weight
from .launching import (
    all_modes,
    library,
    needs_emulator,
    needs_nvcc,
    over_schedules,
    poisoned,
    ptx_under_sanitizers,
    quantized,
)
from .planted import Fault, planted_tests

pytestmark = needs_emulator

CASES = [
    # (N, K, r, blocksize, double quantization): one row; partial groups of 16 rows and of four warps; two blocks of
    # rows; blocks longer and shorter than a thread's columns
    (1, 64, 16, 64, True),
    (37, 320, 16, 64, True),
    (130, 64, 32, 32, False),
    (17, 256, 48, 4096, True),
    (19, 192, 64, 128, True),
]
SCALING = 0.7


def check_merged_weight(
    tested: cuda_host.Library, case: tuple[int, int, int, int, bool], dtype: torch.dtype, mode: str = ""
) -> None:
    """Compare with float64, and count the elements that more than one rounding changes. mode: "plain" runs every
    schedule.
    """
    N, K, r, blocksize, double = case
    packed, constants, absmax = quantized(gaussian(N * K) / K**0.5, blocksize, double)
    A, B = gaussian(K, r, seed=1, dtype=dtype) * 0.2, gaussian(N, r, seed=2, dtype=dtype) * 0.2

    def run(order: str, seed: int) -> tuple[torch.Tensor]:
        w = poisoned(N, K, dtype=dtype)
        arguments = merge_lora_args(nf4_weight(packed, constants, blocksize, N, K), A, B, SCALING, w)
        assert tested.call("launch_merge_lora", arguments, None, seed=seed, order=order) == 0
        return (w,)

    (w,) = over_schedules(mode, run)
    codes = reference.dequantize_nf4(packed, absmax, blocksize, torch.Size((N, K)), torch.float32)
    assert_within(w, merged_weight(codes, A.T, B, SCALING, Arithmetic(dtype, composed=False)), "W'")
    once = (codes + SCALING * (B.float() @ A.float().T)).to(dtype)
    assert (w != once).float().mean() < 0.02, "one rounding; sums of another order may cross a boundary"


@all_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merged_weight(mode: str, case: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    check_merged_weight(library("merge_lora", mode), case, dtype, mode)


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    test_merged_weight(mode, CASES[1], torch.bfloat16)


ROUNDED = "float(round_to<T>(__fmul_rn(value[e], absmax[i])))"
FAULTS = [
    Fault("the scaling", "args.scaling", "1.0f", 0),
    Fault("the one rounding", "__fmul_rn(value[e], absmax[i])", ROUNDED, 0),
    Fault("the columns of A in the tiles", "j * 2 + (g & 1)", "j * 2", 0),
    Fault("the rows of a fragment", "update[half * 4 + e / 2][i * 2 + e % 2]", "update[half * 4 + e / 2][e % 2]", 1),
    Fault("the half of a fragment of B", "exists ? pair(from + 8) : 0", "exists ? pair(from) : 0", 1),
    Fault("the last warp of a row", "k0 >= K", "k0 > K", 1),
    Fault("the second block of rows", "int64_t(blockIdx.y) * kMergeRows", "int64_t(0)", 2),
    Fault(
        "the absmax of a column", "start >> args.weight.block_shift", "(start - t * 16) >> args.weight.block_shift", 2
    ),
    Fault("the steps of the rank", "n * r + step * 16", "n * r", 2),
]


ONE_DTYPE = {
    "launch_merge<T>": "launch_merge<__nv_bfloat16>",
    "merge_lora_kernel<T, 4>": "merge_lora_kernel<T, 3>",
}
"""Leaves the kernels that the test runs, because compiling takes most of its time."""


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "merge_lora", FAULTS, lambda tested, case: check_merged_weight(tested, CASES[case], torch.bfloat16), ONE_DTYPE
)


@pytest.mark.parametrize(
    ("K", "r", "dtype"), [(96, 16, torch.bfloat16), (64, 8, torch.float16), (64, 16, torch.float32)]
)
def test_unsupported_problems_are_refused(K: int, r: int, dtype: torch.dtype) -> None:
    packed, constants, _ = quantized(gaussian(3 * K), 64, True)
    A, B, w = torch.zeros(K, r, dtype=dtype), torch.zeros(3, r, dtype=dtype), torch.zeros(3, K, dtype=dtype)
    arguments = merge_lora_args(nf4_weight(packed, constants, 64, 3, K), A, B, 1.0, w)
    assert library("merge_lora", "plain").call("launch_merge_lora", arguments, None) == 1
