"""csrc/cuda compiled by nvcc for every shipped architecture, checked in SASS. Nothing runs on a GPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from .launching import CUDA_SOURCES, needs_nvcc

pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with triton's wheel: make setup")
from python.kernels_report.cuda_rows import CompileError, cubin, has_kernels, peer_rows, rows_of
from python.kernels_report.row import GATES, WARPS_PER_SM, Row, broken_gates

ARCHS = (80, 86, 89, 90, 100, 120)
TYPES = ("bf16", "fp16")
SOURCES = [path for path in sorted(CUDA_SOURCES.glob("*.cu")) if "__global__" in path.read_text()]

pytestmark = needs_nvcc


@cache
def rows(stem: str, arch: int) -> tuple[Row, ...]:
    return tuple(rows_of(CUDA_SOURCES / f"{stem}.cu", arch))


@pytest.mark.parametrize(
    ("stem", "arch"), [(path.stem, arch) for path in SOURCES for arch in ARCHS if has_kernels(path, arch)]
)
def test_compiles_without_warnings_and_passes_the_gates(stem: str, arch: int) -> None:
    compiled = list(rows(stem, arch))
    assert compiled
    assert broken_gates(compiled) == []
    assert all(row.spills == 0 for row in compiled), "no spills, no local memory"


@pytest.mark.parametrize("arch", ARCHS)
def test_all_gemm_kernels_use_tensor_cores(arch: int) -> None:
    products = [row for row in rows("linear_nf4_gemm", arch) if row.kernel == "linear_nf4_gemm"]
    assert len(products) == 12, "two types, three tiles, two directions"
    assert all(row.tensor_core == "mma.sync" and row.wide_loads >= 4 for row in products)


@pytest.mark.parametrize("arch", ARCHS)
def test_pair_table_kernels_use_tensor_cores_and_few_instructions(arch: int) -> None:
    kernels = {row.config: row for row in rows("linear_nf4_pairs", arch)}
    assert set(kernels) == {f"bf16 M{M} {double}" for M in (8, 16, 24, 32) for double in ("true", "false")}
    assert all(row.tensor_core == "mma.sync" and row.occupancy > 0 for row in kernels.values())
    counted = {c: row.per_weight for c, row in kernels.items() if "M8" in c or "M16" in c}
    bound = 2.0 if arch in (80, 90) else 2.05
    assert all(count is not None and count <= bound for count in counted.values()), counted


@pytest.mark.parametrize("arch", [80, 90])
def test_two_blocks_of_the_pair_table_are_resident_up_to_24_rows(arch: int) -> None:
    warps = {row.config: row.occupancy * WARPS_PER_SM[arch] for row in rows("linear_nf4_pairs", arch)}
    assert all(resident >= 16 for config, resident in warps.items() if "M32" not in config), warps


def test_wgmma_kernels_fit_their_blocks_on_a_multiprocessor() -> None:
    kernels = {row.config: row for row in rows("linear_nf4_wgmma", 90) if row.kernel == "linear_nf4_wgmma"}
    assert set(kernels) == {f"{dtype} M{M} {w}" for dtype in TYPES for M in (64, 128, 256) for w in ("row", "column")}
    for config, row in kernels.items():
        blocks = 2 if "M64" in config.split() else 1
        assert row.occupancy == blocks * 8 / 64, config
        assert row.tensor_core == "wgmma"


def test_serialized_wgmma_is_an_error(tmp_path: Path) -> None:
    """A branch out of a group of stages, for which ptxas waits for each wgmma."""
    for path in CUDA_SOURCES.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    source = tmp_path / "linear_nf4_wgmma.cu"
    text, right = source.read_text(), "weights.template decode<T>(a[stage % 2], "
    assert right in text
    source.write_text(text.replace(right, f"if (step + stage >= steps) break;\n{right}"))
    with pytest.raises(CompileError, match=r"wgmma\.mma_async instructions are serialized"):
        cubin(source, 90)


@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_per_dequantized_weight(arch: int) -> None:
    counted = {row.config: row.per_weight for row in rows("dequantize_nf4", arch) if row.kernel == "dequantize_nf4"}
    assert set(counted) == {"fp32", "bf16", "fp16"}
    assert all(count is not None and count <= 6.0 for count in counted.values()), counted


def test_gates_apply_to_our_rows() -> None:
    compiled = [row for stem in ("dequantize_nf4", "linear_nf4_gemm") for row in rows(stem, 80)]
    concerned = {promise for promise, concerns, _ in GATES if any(concerns(row) for row in compiled)}
    assert {"16-byte loads of packed weights", "a tensor-core instruction wherever there is a matmul"} <= concerned


def test_peer_kernels_are_counted() -> None:
    pytest.importorskip("bitsandbytes")
    peers = {row.kernel: row for row in peer_rows([80])}
    jobs = {"dequantize_nf4, one level", "quantize_nf4, first level", "adamw_step, 32-bit states"}
    assert set(peers) == jobs | {"linear_nf4_small_m", "linear_nf4_gemm"}
    ours = next(r for r in rows("dequantize_nf4", 80) if r.kernel == "dequantize_nf4" and r.config == "bf16")
    theirs = peers["dequantize_nf4, one level"]
    assert ours.per_weight is not None
    assert theirs.per_weight is not None
    assert ours.per_weight < theirs.per_weight
