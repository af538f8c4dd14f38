"""The planner is pure and complete, and measured plans override it."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from qlora_kernels.backends.triton import planner, proxy_fence
from qlora_kernels.backends.triton.planner import (
    ARCHS,
    PATHS,
    Plan,
    candidates,
    modelled_seconds,
    plan,
    use_plan,
)
from qlora_kernels.ops import measured_plans
from qlora_kernels.ops.registry import Problem

N, K = 4096, 4096


def problem(M, op="linear_nf4", N=N, K=K, dtype=torch.bfloat16, blocksize=64):
    return Problem(op, "cuda", dtype, M, N, K, 0, blocksize, True)


@pytest.mark.parametrize("capability", ARCHS)
@pytest.mark.parametrize("op", ["linear_nf4", "linear_nf4_grad_x"])
def test_small_batches_are_fused_and_large_ones_decoded(capability, op):
    paths = [plan(problem(M, op), capability).path for M in (1, 2, 3, 8, 16, 64, 1024, 8192)]
    assert paths[:2] == ["small_m" if op == "linear_nf4" else "fused"] * 2
    assert paths[2:5] == ["fused"] * 3
    assert paths[-2:] == ["decode"] * 2
    assert paths == sorted(paths, key=PATHS.index), "one crossover each"


@pytest.fixture
def installed_triton(monkeypatch):
    """Return a function that makes another version of Triton the installed one, for plans."""

    def install(version):
        monkeypatch.setattr(proxy_fence.metadata, "version", lambda _: version)
        proxy_fence.missing_fence.cache_clear()
        planner._plan.cache_clear()

    yield install
    proxy_fence.missing_fence.cache_clear()
    planner._plan.cache_clear()


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.0+git88b227e2"])
@pytest.mark.parametrize("op", ["linear_nf4", "linear_nf4_grad_x"])
def test_tritons_without_a_proxy_fence_run_no_fused_kernel_on_hopper_and_blackwell(installed_triton, op, version):
    """The products of other GPUs are synchronous, and small_m has none."""
    installed_triton(version)
    for capability in (90, 100, 103):
        paths = [plan(problem(M, op), capability).path for M in (1, 3, 16, 64, 8192)]
        assert paths == ["small_m" if op == "linear_nf4" else "decode", *["decode"] * 4]
        assert f"Triton {version} leaves out the fence" in planner.kernel_plan(problem(16, op), capability).reason
    for capability in (80, 89, 120):
        assert plan(problem(16, op), capability).path == "fused"


def test_measured_plan_without_a_proxy_fence_is_not_used(installed_triton, monkeypatch):
    measured = {measured_plans.bucket(problem(16)): Plan("fused", block_m=16)}
    monkeypatch.setattr(planner, "tuned_plans", lambda capability: measured)
    installed_triton("3.6.0")
    assert plan(problem(16), 90).path == "decode"
    installed_triton("3.7.1")
    assert plan(problem(16), 90) == Plan("fused", block_m=16)


@pytest.mark.parametrize("version", ["3.7.1", "3.7.1+git5d6048aa", "3.8.0", "3.10", "4.0.0"])
def test_tritons_with_the_proxy_fence_are_not_limited(installed_triton, version):
    installed_triton(version)
    assert plan(problem(16), 90).path == "fused"
    assert "fence" not in planner.kernel_plan(problem(8192), 90).reason


def test_small_m_step_minimizes_padding():
    for K, width in ((512, 512), (576, 1024), (4096, 1024), (4608, 512)):
        assert {c.block_k for c in candidates(problem(1, K=K)) if c.path == "small_m"} == {width}
    assert {c.block_k for c in candidates(problem(2)) if c.path == "small_m"} == {512}


@pytest.mark.parametrize("capability", ARCHS)
def test_plans_fit_the_problem(capability):
    for M in (1, 3, 17, 100, 500):
        for blocksize in (32, 64, 4096):
            for chosen in candidates(problem(M, blocksize=blocksize, K=8192)):
                if chosen.path == "fused":
                    assert blocksize % chosen.block_k == 0
                    assert chosen.split_k >= 1
                    assert modelled_seconds(problem(M), chosen, ARCHS[capability]) > 0


@pytest.mark.parametrize(
    "odd", [problem(1, K=4100), problem(64, dtype=torch.float32), problem(1, K=4096 + 32)], ids=["K", "fp32", "block"]
)
def test_unsupported_shapes_use_decode_path(odd):
    assert plan(odd, 90) == Plan("decode")


@pytest.mark.parametrize(
    ("asked", "forced", "message"),
    [
        (problem(20, K=96), Plan("fused", block_k=64), "path must be decode where K .* got fused for K=96"),
        (problem(1, K=96), Plan("small_m", block_k=512), "path must be decode where K .* got small_m for K=96"),
        (problem(20, blocksize=32), Plan("fused", block_k=64), "block_k must divide blocksize=32, got 64"),
    ],
    ids=["fused", "small_m", "block_k"],
)
def test_forced_invalid_plans_are_refused(asked, forced, message):
    with use_plan("linear_nf4", forced), pytest.raises(ValueError, match=message):
        plan(asked, 80)


def test_unknown_gpus_use_nearest_lower_capability():
    assert planner.arch_for(87) is ARCHS[86]
    assert planner.arch_for(103) is ARCHS[100]
    assert planner.arch_for(70) is ARCHS[80]


def test_measured_plans_override_the_model(tmp_path, monkeypatch):
    measured = Plan("fused", block_m=32, block_n=128, split_k=4)
    asked = problem(1000)
    assert plan(asked, 90).path == "decode"
    measured_plans.write(
        90, {measured_plans.bucket(asked): {"backend": "triton"} | asdict(measured)}, {"gpu": "test"}, tmp_path
    )
    monkeypatch.setattr(measured_plans, "FOLDER", tmp_path)
    measured_plans.entries.cache_clear()
    planner.tuned_plans.cache_clear()
    planner._plan.cache_clear()
    try:
        assert plan(asked, 90) == measured
        assert plan(problem(1024), 90) == measured, "the same bucket"
        assert plan(problem(1025), 90).path == "decode"
        with use_plan("linear_nf4", Plan("decode")):
            assert plan(asked, 90) == Plan("decode")
    finally:
        measured_plans.entries.cache_clear()
        planner.tuned_plans.cache_clear()
        planner._plan.cache_clear()
