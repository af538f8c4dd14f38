"""ds and grad_B by one pass over grad_y and by two, interpreted, against float64; the memory of partial sums."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.triton import lora_grads
from qlora_kernels.backends.triton.lora_grads import PARTS_PER_SM, bytes_of_ds_parts, passes_over_grad_y
from qlora_kernels.backends.triton.planner import ARCHS
from qlora_kernels.ops.operands import Needs

from .checks import TWO_PASSES, check_ds_and_grad_B, check_two_passes


@pytest.mark.parametrize(("dtype", "copies"), [(torch.bfloat16, False), (torch.float16, True)])
def test_two_passes_over_grad_y(dtype: torch.dtype, copies: bool) -> None:
    check_two_passes(dtype, copies)
    check_ds_and_grad_B(*TWO_PASSES, dtype, copies)  # one pass


@pytest.mark.parametrize("capability", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_of_partial_sums_is_bounded(capability: int, dtype: torch.dtype) -> None:
    """By PARTS_PER_SM for ds, and 64 KiB for each multiprocessor for grad_B, whatever the problem."""
    bound = (PARTS_PER_SM + 2**16) * ARCHS[capability].sm_count
    for M in (1, 500, 4096, 16384, 131072):
        for N in (64, 1024, 14336, 128256):
            for r in (4, 16, 32, 64, 256):
                problem = ((M, N, r), (dtype, dtype), capability)
                sequence = lora_grads._ds_grad_B_sequence(*problem, 1.0, Needs(), None)
                assert sequence.temporary_bytes <= bound, (M, N, r)


@pytest.mark.parametrize(
    ("M", "N", "r", "passes", "megabytes"),
    [
        (16384, 14336, 16, 1, 59),
        (16384, 14336, 64, 2, 0),  # one pass would write 470 MB and read them again, to read as much only once
        (16384, 4096, 64, 2, 0),
        (16384, 128256, 16, 2, 0),  # 525 MB exceed the bound
        (64, 4096, 64, 1, 1),  # a launch takes longer than the bytes
    ],
)
def test_passes_over_grad_y(M: int, N: int, r: int, passes: int, megabytes: int) -> None:
    problem = (M, N, r, torch.bfloat16, 90)
    assert passes_over_grad_y(*problem) == passes
    assert round(bytes_of_ds_parts(*problem)[passes - 1] / 1e6) == megabytes
