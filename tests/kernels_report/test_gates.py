"""Gates of the kernels report: each planted regression is named, and the kernels as compiled break none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from python.kernels_report import __main__ as report
from python.kernels_report.mock_gpu import compiling_for
from python.kernels_report.row import Row, broken_gates, occupancy
from python.kernels_report.triton_rows import Case, compile_case, meta, narrow_products, row_of, weight
from qlora_kernels.backends.triton.dequantize_nf4 import dequantize_nf4
from qlora_kernels.backends.triton.linear_nf4 import linear_nf4
from qlora_kernels.backends.triton.lora_grads import lora_ds_grad_B
from qlora_kernels.backends.triton.planner import Plan, plan
from qlora_kernels.ops.operands import Needs
from qlora_kernels.ops.registry import Problem

FUSED = Plan("fused", block_m=16, block_n=64, block_k=64)

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
FP32 = replace(GOOD, config="fp32 M16 N64 K64 b64 dq", tensor_core="", matmul=False)
SMALL_M = replace(
    FP32, kernel="linear_nf4_small_m_kernel", config="bf16 M1 N4 K1024 b64 dq", per_weight=4.8, wide_loads_needed=12
)
PAIRS = replace(GOOD, source="cuda", kernel="linear_nf4_pairs", config="bf16 M16 true", per_weight=2.0)
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
        (replace(GOOD, narrow_copies=3), "no copy of weights or activations under 16 bytes"),
        (replace(SMALL_M, wide_loads=11), "16-byte loads"),
        (replace(GOOD, narrow_products=1), "offsets in 64 bits"),
        (replace(GOOD, arch=86, shared=101377), "shared memory"),
        (replace(SMALL_M, per_weight=6.5), "small_m with one row"),
        (replace(SMALL_M, spills=1), "no spills"),
        (replace(PAIRS, per_weight=2.1), "in the pair-table loop"),
        (replace(PAIRS, config="bf16 M24 true", per_weight=2.35), "in the pair-table loop"),
        (replace(PAIRS, early_waits=1), "no wait for a load"),
        (replace(PAIRS, tensor_core=""), "wherever there is a matmul"),
        (replace(CODEC, per_weight=8.2), "SASS instructions per weight"),
        (replace(CODEC, per_weight=None), "SASS instructions per weight"),
    ],
)
def test_gate_names_regression(row, promise):
    assert any(promise in line and f"sm_{row.arch}" in line for line in broken_gates([row]))


def test_good_rows_pass_all_gates():
    assert broken_gates([GOOD, FP32, SMALL_M, PAIRS, CODEC, replace(CODEC, arch=120, per_weight=7.0)]) == []


def run_report(monkeypatch, rows, *arguments):
    """Return the command's exit code, with `rows` instead of compiled kernels."""
    monkeypatch.setattr(report, "triton_rows_of_each", lambda archs, full: [r for r in rows if r.arch in archs])
    monkeypatch.setattr(report, "cuda_rows", lambda archs: [])
    monkeypatch.setattr("sys.argv", ["kernels_report", *arguments])
    return report.main()


def test_a_broken_gate_fails_the_command(monkeypatch, tmp_path, capsys):
    assert run_report(monkeypatch, [GOOD], "--out", str(tmp_path)) == 0
    assert run_report(monkeypatch, [GOOD, replace(GOOD, spills=2)], "--out", str(tmp_path)) == 1
    assert "no spills" in capsys.readouterr().err
    assert "no spills" in (tmp_path / "report.md").read_text().split("Broken:")[1]


def test_summary_has_one_line_for_each_kernel(monkeypatch, tmp_path):
    page = tmp_path / "summary.md"
    rows = [GOOD, replace(GOOD, registers=GOOD.registers + 8), replace(CODEC, arch=80)]
    assert run_report(monkeypatch, rows, "--out", str(tmp_path), "--summary", str(page)) == 0
    lines = page.read_text().splitlines()
    assert len(lines) <= 60
    assert sum(line.startswith(f"| {GOOD.source} | {GOOD.kernel} | 2 | {GOOD.registers} to") for line in lines) == 1


def test_architectures_merge_into_one_report(monkeypatch, tmp_path):
    out = ("--out", str(tmp_path))
    assert run_report(monkeypatch, [replace(GOOD, spills=1), replace(CODEC, arch=80)], *out) == 1
    assert run_report(monkeypatch, [GOOD], *out, "--archs", "90", "--merge", "--parts", "cuda") == 1, "no row replaced"
    assert run_report(monkeypatch, [GOOD], *out, "--archs", "90", "--merge") == 0
    kept = [(row["kernel"], row["arch"]) for row in json.loads((tmp_path / "report.json").read_text())["rows"]]
    assert sorted(kept) == [("dequantize_nf4_kernel", 80), ("linear_nf4_kernel", 90)]
    assert run_report(monkeypatch, [GOOD], *out, "--archs", "90", "--merge", "--quick") == 0
    assert "Triton for sm_90: only" in (tmp_path / "report.md").read_text()
    assert run_report(monkeypatch, [GOOD], *out, "--archs", "90", "--merge") == 0
    assert "only the configs" not in (tmp_path / "report.md").read_text()
    stale = (tmp_path / "report.json").read_text().replace('"triton": "', '"triton": "0.', 1)
    (tmp_path / "report.json").write_text(stale)
    with pytest.raises(SystemExit, match="run without --merge"):
        run_report(monkeypatch, [GOOD], *out, "--archs", "90", "--merge")


@triton.jit
def last_of_each_row_kernel(p_x, p_out, ROW_TYPE: tl.constexpr, K, steps, N: tl.constexpr):
    first = tl.program_id(0) * steps
    row = (first + tl.arange(0, N)).to(ROW_TYPE)
    tl.store(p_out + row, tl.load(p_x + row * K + 3 * N))


@pytest.mark.parametrize(("row_type", "products"), [(tl.int32, 1), (tl.int64, 0)])
def test_32_bit_offsets_are_detected(row_type, products):
    with compiling_for(80) as launches:
        last_of_each_row_kernel[(1,)](meta(64, 4099), meta(64), row_type, 4099, 7, N=32)
    assert len(narrow_products(launches[0].kernel.asm["ttir"])) == products


def test_occupancy():
    assert occupancy(90, registers=32, shared=0, warps=4) == 1.0
    assert occupancy(90, registers=168, shared=36864, warps=4) == 3 * 4 / 64
    assert occupancy(90, registers=32, shared=100_000, warps=4) == 2 * 4 / 64


@pytest.mark.parametrize(("gap", "config", "budget"), [(0, "bf16 b64 dq", 5.5), (16, "bf16 b64 dq rows", 7.0)])
@pytest.mark.parametrize("arch", [80, 90])
def test_dequantize_is_compiled_within_its_budget(arch, gap, config, budget):
    """The report of one kernel, through the launcher on a mock GPU. gap: elements between rows of the result."""
    case = Case(lambda: dequantize_nf4(weight(), out=meta(4096, 4096 + gap, dtype=torch.bfloat16)[:, :4096]))
    (launch,) = compile_case(case, arch)
    row = row_of(launch, case, arch)
    assert launch.grid == (1024,)
    assert row.config == config
    assert row.per_weight is not None
    assert row.per_weight < budget
    assert broken_gates([row]) == []


@pytest.mark.parametrize(
    ("M", "dtype", "kernels"),
    [
        (64, torch.bfloat16, ["lora_ds_grad_B_kernel"]),
        (4096, torch.float32, ["lora_ds_grad_B_kernel"]),
        (4096, torch.bfloat16, ["lora_down_kernel", "lora_ds_grad_B_kernel"]),
    ],
    ids=["one pass", "one pass fp32", "two passes"],
)
def test_rank_64_gradients_do_not_spill(M, dtype, kernels):
    """The widest accumulators of the adapter kernels, at the rank of the QLoRA paper, where sm_80 has least room; and
    fp32, whose products hold the operands of a whole step."""
    grad_y, s, lora_B = meta(M, 4096, dtype=dtype), meta(M, 64, dtype=dtype), meta(4096, 64)
    case = Case(lambda: lora_ds_grad_B(grad_y, s, lora_B, 2.0, Needs()))
    rows = [row_of(launch, case, 80) for launch in compile_case(case, 80)]
    assert [row.kernel for row in rows if row.kernel != "sum_partials_kernel"] == kernels
    assert broken_gates(rows) == []


@pytest.mark.parametrize("arch", [80, 90])
def test_small_m_is_compiled_within_its_budget(arch):
    """The fused kernel also copies packed weights in units of 16 bytes."""
    problem = Problem("linear_nf4", "cuda", torch.bfloat16, 1, 4096, 4096, 0, 64, True)
    x = meta(1, 4096, dtype=torch.bfloat16)
    for chosen, kernel in ((plan(problem, arch), "linear_nf4_small_m_kernel"), (FUSED, "linear_nf4_kernel")):
        case = Case(lambda: linear_nf4(x, weight(True), None), problem, chosen)
        rows = [row_of(launch, case, arch) for launch in compile_case(case, arch)]
        assert [row.kernel for row in rows] == [kernel]
        assert broken_gates(rows) == []
