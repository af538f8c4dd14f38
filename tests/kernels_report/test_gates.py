"""The kernels report's gates: each planted regression is named, and what is compiled today breaks none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from python.kernels_report.row import Row, broken_gates, occupancy
from python.kernels_report.triton_rows import Case, compile_case, meta, row_of, weight
from qlora_kernels.backends.triton.dequantize_nf4 import dequantize_nf4
from qlora_kernels.backends.triton.lora_grads import lora_ds_grad_B

GOOD = Row(
    source="triton",
    kernel="linear_nf4_kernel",
    config="bf16 M64 N128 K64 b64 dq",
    arch=90,
    registers=168,
    spills=0,
    shared=36864,
    occupancy=0.19,
    tensor_core="wgmma",
    tensor_core_count=8,
    wide_loads=12,
    narrow_copies=0,
    instructions=1100,
    per_weight=6.4,
    matmul=True,
)
CODEC = replace(GOOD, kernel="dequantize_nf4_kernel", tensor_core="", matmul=False, per_weight=4.9)


@pytest.mark.parametrize(
    ("row", "promise"),
    [
        (replace(GOOD, spills=2), "no spills"),
        (replace(GOOD, tensor_core="mma.sync"), "own tensor-core instruction"),
        (replace(GOOD, arch=100), "own tensor-core instruction"),
        (replace(GOOD, tensor_core=""), "wherever there is a matmul"),
        (replace(GOOD, narrow_copies=32), "no table lookup turned into cp.async"),
        (replace(GOOD, wide_loads=0), "16-byte loads"),
        (replace(CODEC, per_weight=8.2), "SASS instructions per weight"),
        (replace(CODEC, per_weight=None), "SASS instructions per weight"),
    ],
)
def test_a_regression_is_named(row, promise):
    assert any(promise in line and f"sm_{row.arch}" in line for line in broken_gates([row]))


def test_good_rows_break_nothing():
    assert broken_gates([GOOD, CODEC, replace(CODEC, arch=120, per_weight=7.0)]) == []


def test_occupancy():
    assert occupancy(90, registers=32, shared=0, warps=4) == 1.0
    assert occupancy(90, registers=168, shared=36864, warps=4) == 3 * 4 / 64
    assert occupancy(90, registers=32, shared=100_000, warps=4) == 2 * 4 / 64


@pytest.mark.parametrize("arch", [80, 90])
def test_dequantize_is_compiled_within_its_budget(arch):
    """Through the launcher, on a mock GPU: the whole report in small."""
    case = Case(lambda: dequantize_nf4(weight(), out=meta(4096, 4096, dtype=torch.bfloat16)))
    (launch,) = compile_case(case, arch)
    row = row_of(launch, case, arch)
    assert launch.grid == (1024,)
    assert row.config == "bf16 b64 dq"
    assert row.per_weight is not None
    assert row.per_weight < 5.5
    assert broken_gates([row]) == []


def test_rank_64_gradients_do_not_spill():
    """The widest accumulators of the adapter kernels, at the rank of the QLoRA paper, where sm_80 has least room."""
    bf16 = torch.bfloat16
    grad_y, s, lora_B = meta(4096, 4096, dtype=bf16), meta(4096, 64, dtype=bf16), meta(4096, 64)
    case = Case(lambda: lora_ds_grad_B(grad_y, s, lora_B, 2.0))
    rows = [row_of(launch, case, 80) for launch in compile_case(case, 80)]
    assert rows[0].kernel == "lora_ds_grad_B_kernel"
    assert broken_gates(rows) == []
