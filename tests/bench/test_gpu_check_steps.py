"""The steps of the GPU check, run on the CPU by the CPU backend: their code, not what they measure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import graphs
from bench.gpu_check import cases, compare, host_time, kernel_times, paging, peer_times, rows, training
from bench.gpu_check.forced_paths import forced_paths
from qlora_kernels.backends.cuda import routing
from qlora_kernels.backends.triton import planner
from qlora_kernels.ops import measured_plans
from qlora_kernels.ops.registry import Problem, kernels_of

SIZES = cases.Sizes(5, 64, 128, 8)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> rows.Rows:
    """Rows of a step that runs on the CPU."""
    monkeypatch.setattr(rows, "DEVICE", "cpu")
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    return rows.Rows(tmp_path, "test")


@pytest.mark.parametrize("double", [True, False])
def test_codec(written: rows.Rows, double: bool) -> None:
    assert compare.check_codec(written, "cpu", torch.bfloat16, 4096 + 96, double)


@pytest.mark.parametrize("dtype", compare.TOLERANCE, ids=str)
@pytest.mark.parametrize("name", cases.CASES)
def test_case(written: rows.Rows, dtype: torch.dtype, name: str) -> None:
    assert compare.check_case(written, "cpu", name, dtype, SIZES)


def test_lora_linear_with_dropout(written: rows.Rows) -> None:
    assert compare.check_case(written, "cpu", "lora", torch.bfloat16, replace(SIZES, p=0.1))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_op_of_a_backend_has_a_case(backend: str) -> None:
    assert {"linear", "lora", "group"} <= set(cases.cases_of(list(kernels_of(backend))))


def test_op_without_a_case_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"^gpu_check: no case for new_op; add one to"):
        cases.cases_of(["linear_nf4", "linear_nf4_grad_x", "new_op"])


def test_wrong_result_is_a_failed_row(written: rows.Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def wrong_on_the_device(*arguments: Any) -> Sequence[torch.Tensor]:
        calls.append(1)
        y, *gradients = cases.lora(*arguments)
        return [y * (1.1 if len(calls) <= 2 else 1.0), *gradients]

    monkeypatch.setitem(cases.CASES, "lora", (wrong_on_the_device, ()))
    assert not compare.check_case(written, "cpu", "lora", torch.bfloat16, SIZES)
    assert rows.read(written.path.parent)[-1]["ok"] is False


def test_host_time(written: rows.Rows) -> None:
    host_time.measure(written, "cpu", SIZES, calls=1, repeats=1)
    assert [row["call"] for row in rows.read(written.path.parent)] == [*host_time.layer_calls(SIZES)]


@pytest.mark.parametrize("way", ["fused op", "by parts", "dense"])
def test_training(written: rows.Rows, way: str) -> None:
    training.measure(written, training.Sizes(8, 64, 64, 2, 1, 1), way, "cpu", 0.05, seconds=0.0)
    assert rows.read(written.path.parent)[-1]["tokens_per_s"] > 0


def test_paging(written: rows.Rows) -> None:
    assert paging.check_bits(written)
    paging.measure(written, 10_000, pressure=False)


def test_times_of_bitsandbytes(written: rows.Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(graphs, "median_seconds", lambda calls, *_: float(calls[0]().shape == (5, 64)))
    monkeypatch.setattr(graphs, "copies_beyond_l2", lambda *_: 2)
    peer_times.measure(written, (64, 64), (5,), torch.empty(1))
    assert rows.read(written.path.parent)[-1]["us"] == 1e6


def test_kernel_times_write_the_fastest_entries(written: rows.Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two forced ways the faster one reaches the tuned file."""
    seconds = iter([1.0, 3e-6, 2e-6])

    def timed(calls: Sequence[Callable[[], object]], *_: Any) -> float:
        for call in calls:
            call()
        return next(seconds)

    def two_ways(*_: Any) -> Iterator[kernel_times.Forced]:
        for path in ("fused", "decode"):
            yield {"backend": "cuda", "path": path}, contextlib.nullcontext()

    monkeypatch.setattr(graphs, "median_seconds", timed)
    monkeypatch.setattr(graphs, "copies_beyond_l2", lambda *_: 2)
    monkeypatch.setattr(kernel_times, "paths", two_ways)
    monkeypatch.setattr(kernel_times.qk, "use_backend", lambda name: contextlib.nullcontext())
    with planner.assume_capability(90):
        kernel_times.measure_shape(written, "triton", (64, 64), (5,), torch.empty(1))
        kernel_times.write_tuned(written.path.parent, written)
    (entry,) = json.loads((written.path.parent / "sm_90.json").read_text())["plans"].values()
    assert entry == {"backend": "cuda", "path": "decode"}


@pytest.mark.parametrize(
    ("compared", "chosen"),
    [
        ([], "fused"),
        ([("wgmma", True), ("wgmma", False)], "fused"),
        ([("wgmma", True), ("fused", True)], "wgmma"),
        ([("wgmma", False), ("fused", False)], "decode"),
    ],
    ids=["not compared", "wrong once", "right", "both wrong"],
)
def test_tuned_file_leaves_out_paths_with_wrong_results(
    written: rows.Rows, compared: list[tuple[str, bool]], chosen: str
) -> None:
    """Times of a path count if all its comparisons were right, and those of wgmma only if there were some."""
    comparisons = rows.Rows(written.path.parent, "compare")
    for path, ok in compared:
        comparisons.add(backend="cuda", path=path, ok=ok)
    key = measured_plans.bucket(Problem("linear_nf4", "cuda", torch.bfloat16, 256, 4096, 4096, 0, 64, True))
    for us, path in ((3.0, "decode"), (2.0, "fused"), (1.0, "wgmma")):
        written.add(backend="cuda", path=path, us=us, key=key, entry={"backend": "cuda", "path": path})
    with planner.assume_capability(90):
        kernel_times.write_tuned(written.path.parent, written)
    (entry,) = json.loads((written.path.parent / "sm_90.json").read_text())["plans"].values()
    assert entry == {"backend": "cuda", "path": chosen}


def test_paths_on_request_are_forced_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "holds_sm90a", lambda: True)
    problem = Problem("linear_nf4", "cuda", torch.bfloat16, 256, 4096, 4096, 0, 64, True)
    assert "wgmma" not in forced_paths(problem, 90, "")
    assert forced_paths(problem, 90, "wgmma") == ["wgmma"]
    assert forced_paths(problem, 80, "wgmma") == []


def test_bundle_prepares_the_kernels_of_every_measuring_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All launchers take tensors without memory; nothing is compiled here."""
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *_, **__: self)
    from bench.gpu_check import warm_cache

    names = {launch.name for launch in warm_cache.compile_measurements(90, tiny=False)}
    codec = {"quantize_nf4_kernel", "quantize_absmax_kernel", "dequantize_nf4_kernel"}
    linears = {"linear_nf4_small_m_kernel", "linear_nf4_kernel", "linear_nf4_grad_x_kernel", "lora_up_kernel"}
    assert names == codec | linears | {
        "lora_down_kernel",
        "lora_ds_grad_B_kernel",
        "lora_grad_A_kernel",
        "sum_partials_kernel",
    }
