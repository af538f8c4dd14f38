"""Which CUDA kernel serves a product: the table, what overrides it, and that the table is what the model says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import roofline
from qlora_kernels.backends import cuda, triton
from qlora_kernels.backends.cuda import routing
from qlora_kernels.ops import extended_k, measured_plans, registry
from qlora_kernels.ops.registry import Problem, planned_rows


def problem(
    M: int, op: str = "linear_nf4", dtype: torch.dtype = torch.bfloat16, N: int = 4096, K: int = 4096
) -> Problem:
    return Problem(op, "cuda", dtype, M, N, K, 0, 64, True)


def kernel(M: int, capability: int = 80, **of_problem: object) -> str:
    return routing.route(problem(M, **of_problem), capability).kernel  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", routing.BOUNDS)
def test_routing_table_equals_roofline_model(capability: int) -> None:
    bounds, gpu = routing.BOUNDS[capability], roofline.GPUS[capability]
    assert bounds.fused_rows == roofline.fused_rows(gpu)
    assert bounds.pair_rows == roofline.pair_rows(gpu)
    assert routing.MOST_WGMMA_ROWS == roofline.WGMMA_MOST_ROWS


@pytest.mark.parametrize("capability", routing.BOUNDS)
def test_all_rows_of_a_range_of_the_pair_table_are_planned_in_it(capability: int) -> None:
    bounds = routing.BOUNDS[capability]
    for M in range(1, 65):
        assert bounds.pair_range(planned_rows(M)) == bounds.pair_range(M)


def test_bounds_of_an_unknown_gpu_are_those_of_the_nearest_below() -> None:
    assert routing.bounds_of(103) == routing.BOUNDS[100]
    assert routing.bounds_of(75) == routing.BOUNDS[80]


def test_every_kernel_serves_its_rows() -> None:
    rows = (1, 2, 3, 16, 17, 128, 129)
    assert [kernel(M) for M in rows] == [routing.SMALL_M] * 2 + [routing.PAIRS] * 2 + [routing.GEMM] * 2 + [
        routing.DECODE
    ]
    assert [kernel(M, dtype=torch.float16) for M in (4, 5)] == [routing.SMALL_M, routing.GEMM]
    assert kernel(2, 100) == kernel(32, 100) == routing.PAIRS
    assert [kernel(M, 86) for M in (5, 9, 17, 24, 25, 33, 48, 49)] == [routing.PAIRS, routing.GEMM] + [
        routing.PAIRS
    ] * 2 + [routing.GEMM] + [routing.PAIRS] * 2 + [routing.GEMM]
    assert [kernel(M, 120) for M in (25, 48, 49)] == [routing.PAIRS] * 2 + [routing.GEMM]
    assert kernel(192, 90) == routing.GEMM
    assert kernel(192, 100) == routing.DECODE
    assert kernel(1, op="linear_nf4_lora_backward") == routing.GEMM
    assert kernel(16, dtype=torch.float32) == routing.SMALL_M
    assert kernel(17, dtype=torch.float32) == routing.DECODE
    assert kernel(1, op="linear_nf4_grad_x", dtype=torch.float32) == routing.DECODE


@pytest.mark.parametrize(("op", "N", "K"), [("linear_nf4", 64, 40), ("linear_nf4_grad_x", 12, 64)])
def test_shapes_unsupported_by_fused_kernels_are_decoded(op: str, N: int, K: int) -> None:
    assert kernel(8, op=op, N=N, K=K) == routing.DECODE


def test_plan_of_a_lora_linear_says_where_its_low_rank_term_is_added() -> None:
    def plan(op: str, M: int = 4096, N: int = 4096, K: int = 4096, **of_problem: object) -> str:
        asked = problem(M, op, N=N, K=K)._replace(r=16, **of_problem)  # type: ignore[arg-type]
        return str(routing.lora_plan(asked, 90))

    inside, added = extended_k.INSIDE, extended_k.ADDED
    assert inside in plan("linear_nf4_lora")
    assert inside in plan("linear_nf4_lora", dropout=True)
    assert inside in plan("linear_nf4_lora_backward")
    assert added in plan("linear_nf4_lora_backward", dropout=True)
    assert added in plan("linear_nf4_lora", K=14336)
    assert added in plan("linear_nf4_lora", dtype=torch.float32)
    assert added in plan("linear_nf4_lora", N=64, K=36), "rows of x that are not whole 16-byte pieces"
    assert plan("linear_nf4_lora", M=8).startswith(routing.PAIRS)
    assert plan("linear_nf4_lora_merged").startswith(extended_k.MERGED)
    assert plan("linear_nf4_lora_merged_backward").startswith(extended_k.MERGED)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "x is float16, not bfloat16"),
        ({"blocksize": 128}, "blocksize 128 is not 64"),
        ({"K": 4160}, "K=4160 is not a multiple of 256, four blocks"),
    ],
    ids=str,
)
def test_the_plan_says_why_the_pair_table_is_left_out(change: dict, reason: str) -> None:  # type: ignore[type-arg]
    plan = routing.route(problem(8)._replace(**change), 80)
    assert plan.kernel == routing.GEMM
    assert f"linear_nf4_pairs.cu is left out: {reason}" in plan.reason


def test_the_environment_selects_the_pair_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_pairs", routing.choice("QLORA_CUDA_PAIRS", "1"))
    assert [kernel(M) for M in (1, 16, 64, 65)] == [routing.PAIRS] * 3 + [routing.GEMM]
    assert kernel(8, dtype=torch.float16) == routing.GEMM
    monkeypatch.setattr(routing, "_pairs", routing.choice("QLORA_CUDA_PAIRS", "0"))
    assert [kernel(M) for M in (4, 8)] == [routing.SMALL_M, routing.GEMM]
    assert "QLORA_CUDA_PAIRS=0" in routing.route(problem(8), 80).reason
    assert routing.choice("QLORA_CUDA_PAIRS", None) is routing.choice("QLORA_CUDA_PAIRS", "") is None
    with pytest.raises(ValueError, match="QLORA_CUDA_PAIRS must be 0 or 1, got 'yes'"):
        routing.choice("QLORA_CUDA_PAIRS", "yes")


@pytest.fixture
def with_sm90a(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library that holds code for sm_90a."""
    monkeypatch.setattr(routing, "holds_sm90a", lambda: True)
    routing._route.cache_clear()
    yield
    routing._route.cache_clear()


@pytest.mark.usefixtures("with_sm90a")
def test_wgmma_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (1, 16, 64, 256, 1024, 1025)
    assert routing.WGMMA not in [kernel(M, 90) for M in rows], "no default"
    with routing.use_path("wgmma"):
        assert kernel(64, 90) == routing.WGMMA
        assert kernel(64, 80) == kernel(64, 100) == routing.GEMM
    monkeypatch.setattr(routing, "_wgmma", routing.choice("QLORA_CUDA_WGMMA", "1"))
    assert [kernel(M, 90) for M in rows] == [routing.WGMMA] * 5 + [routing.DECODE]
    plan = routing.route(problem(256), 90)
    assert str(plan) == "linear_nf4_wgmma.cu [block_m=256 block_n=128 block_k=64]: QLORA_CUDA_WGMMA=1"
    assert kernel(256, 90, op="linear_nf4_lora_backward") == routing.WGMMA
    monkeypatch.setattr(routing, "_pairs", True)
    assert [kernel(M, 90) for M in (64, 65)] == [routing.PAIRS, routing.WGMMA], "QLORA_CUDA_PAIRS=1 comes first"


@pytest.mark.usefixtures("with_sm90a")
@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({}, 80, "the GPU is sm_80, not sm_90"),
        ({}, 100, "the GPU is sm_100, not sm_90"),
        (
            {"op": "linear_nf4_grad_x", "N": 4092},
            90,
            "N=4092 is not a multiple of 8, the elements of one 16-byte load of grad_y",
        ),
        ({"dtype": torch.float32}, 90, "x is float32"),
        ({"M": 2048}, 90, "M=2048 > 1024"),
        ({"blocksize": 32}, 90, "blocksize 32 is less than 64"),
        ({"K": 4128}, 90, "K=4128 is not a multiple of 64"),
    ],
    ids=str,
)
def test_the_plan_says_why_wgmma_is_left_out(
    change: dict,
    capability: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[type-arg]
) -> None:
    monkeypatch.setattr(routing, "_wgmma", True)
    plan = routing.route(problem(64)._replace(**change), capability)
    assert plan.kernel != routing.WGMMA
    assert plan.reason.endswith(f"linear_nf4_wgmma.cu is left out: {reason}")


def test_wgmma_needs_a_library_for_sm_90a(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "holds_sm90a", lambda: False)
    monkeypatch.setattr(routing, "built_for", lambda: "80+PTX by CUDA 13.0")
    assert routing.wgmma_obstacle(problem(64), 90) == (
        "the library is built for 80+PTX by CUDA 13.0, without sm_90a; rebuild it with QLORA_CUDA_ARCHS=90a"
    )


@pytest.mark.parametrize("M", [1, 3, 16, 17, 25, 33, 49, 64, 65, 1000, 1025, 5000])
def test_planned_rows_are_no_fewer_and_in_the_same_bucket(M: int) -> None:
    rows = planned_rows(M)
    assert rows >= M
    assert planned_rows(rows) == rows
    assert measured_plans.bucket(problem(rows)) == measured_plans.bucket(problem(M))
    assert routing.gemm_tile(rows) == routing.gemm_tile(M)
    assert routing.wgmma_tile(rows) == routing.wgmma_tile(M)
    assert M > routing.MOST_PAIR_ROWS or routing.pairs_tile(rows) == routing.pairs_tile(M)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tuned files that is read in place of the package's."""
    monkeypatch.setattr(measured_plans, "FOLDER", tmp_path)
    caches = (measured_plans.entries, routing._route, registry._select)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_measured_paths_override_the_table(measured: Path) -> None:
    plans = {
        measured_plans.bucket(problem(256)): {"backend": "cuda", "path": "fused"},
        measured_plans.bucket(problem(8)): {"backend": "cuda", "path": "small_m"},
        measured_plans.bucket(problem(64)): {"backend": "cuda", "path": "small_m"},  # a kernel that takes 16 rows
        measured_plans.bucket(problem(4)): {"backend": "triton", "path": "decode"},
    }
    measured_plans.write(90, plans, {"gpu": "test"}, measured)
    assert [kernel(M, 90) for M in (250, 256, 257)] == [routing.GEMM, routing.GEMM, routing.DECODE]
    assert kernel(8, 90) == routing.SMALL_M
    assert kernel(64, 90) == routing.GEMM, "an entry that the kernel cannot serve has no effect"
    assert kernel(4, 90) == routing.PAIRS, "the other backend's entry has no effect"


def test_measurements_choose_between_the_backends(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    plans = {
        measured_plans.bucket(problem(64)): {"path": "fused"},
        measured_plans.bucket(problem(8)): {"backend": "cuda", "path": "fused"},
    }
    (measured / "sm_90.json").write_text(json.dumps({"measured_on": {}, "plans": plans}))
    kernels = {"cuda": {s.op: s for s in cuda.KERNELS}, "triton": {s.op: s for s in triton.KERNELS}}

    def best(asked: Problem) -> str:
        return max(("cuda", "triton"), key=lambda backend: kernels[backend][asked.op].priority(asked))

    assert best(problem(64)) == "triton", "an entry without a backend is Triton's"
    assert best(problem(60, "linear_nf4_lora")) == "triton"
    assert best(problem(8)) == "cuda"
    assert best(problem(512)) == "cuda", "where nothing was measured"
    assert best(problem(8, "linear_nf4_lora")._replace(dropout=True)) == "triton"


def test_an_unknown_backend_in_a_tuned_file_is_an_error(measured: Path) -> None:
    measured_plans.write(90, {measured_plans.bucket(problem(8)): {"backend": "rocm", "path": "fused"}}, {}, measured)
    with pytest.raises(ValueError, match=r"sm_90.json: backend must be one of .* got 'rocm'"):
        kernel(8, 90)


def test_choice_is_cached_by_planned_rows_and_errors_name_requested_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    registry._select.cache_clear()
    cpu = problem(1001, N=64, K=64)._replace(device="cpu")
    first = registry.select(cpu)
    misses = registry._select.cache_info().misses
    assert registry.select(cpu._replace(M=1024)) is first
    assert registry._select.cache_info().misses == misses
    monkeypatch.setattr(registry, "_forced", "cuda")
    monkeypatch.setattr(registry, "unavailable", lambda name: "not here")
    with pytest.raises(NotImplementedError, match="M=1001"):
        registry.select(cpu)
