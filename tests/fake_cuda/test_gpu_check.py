"""The whole of `make gpu-check` in its smallest sizes on the fake device: its code runs from start to end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_check import __main__ as check
from bench.gpu_check import claims, rows
from qlora_kernels.backends import cuda
from qlora_kernels.backends.cuda.availability import holds_sm90a
from tests.support import fake_cuda

SCHEDULES = ("eager",)
PYTHON = Path(fake_cuda.__file__).with_name("python")


def rehearse(
    out: Path, *flags: str, folder: Path = check.ROOT
) -> tuple[subprocess.CompletedProcess[str], list[rows.Row]]:
    """Return the ended check of the package in `folder`, and its rows."""
    command = [str(PYTHON), "-m", "bench.gpu_check", "--out", str(out), "--tiny", *flags]
    variables = os.environ | {"FAKE_CUDA_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    return done, rows.read(out)


def results(found: list[rows.Row]) -> dict[str, rows.Row]:
    return {row["name"]: row for row in found if row["step"] == "run"}


def test_every_step_passes(tmp_path: Path) -> None:
    done, found = rehearse(tmp_path, "--seconds", "1200")
    logs = {path.name: path.read_text()[-2000:] for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    ended = results(found)
    assert set(ended) == {check.PROBE.name, *(step.name for step in check.STEPS)}
    assert {row["skipped"].split()[0] for row in ended.values() if "skipped" in row} <= {"compute-sanitizer", "ncu"}
    assert {row["backend"] for row in found if row["step"] == "times" and "entry" in row} == {"cuda", "triton"}
    assert (tmp_path / "sm_80.json").exists()
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(lines) == 1 + len(claims.claims(80))
    measured = {line.split(" | ")[0]: line.split(" | ")[2] for line in lines[1:]}
    assert measured["PagedAdamW equals the CPU bit for bit"] == "yes"
    for backend in ("cuda", "triton"):
        right, of, all_ = measured[f"{backend}: every result equals the CPU's within its bound"].split()
        assert (right, of) == (all_, "of")


def test_damaged_library_does_not_affect_the_other_backend(tmp_path: Path) -> None:
    """In a copy of the package whose CUDA library is damaged."""
    for name in ("qlora_kernels", "bench"):
        unused = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(check.ROOT / name, tmp_path / name, ignore=unused)
    library = tmp_path / cuda.LIBRARY.relative_to(check.ROOT)
    library.write_bytes(library.read_bytes()[:1000])
    out = tmp_path / "out"
    done, found = rehearse(out, "--only", "smoke", "compare cuda", folder=tmp_path)
    assert done.returncode == 1, done.stderr
    ended = results(found)
    assert ended["smoke cuda"]["ok"] is False
    assert ended["smoke triton"]["ok"] is True
    assert ended["compare cuda"]["skipped"] == "the smoke step of cuda failed"
    (state,) = [row["state"] for row in found if row["step"] == "smoke" and row.get("backend") == "cuda"]
    assert state.startswith("OSError: ")
    assert "failed: smoke cuda" in done.stdout


@pytest.mark.skipif(not holds_sm90a(), reason="the library is built without sm_90a; build it by QLORA_CUDA_ARCHS=90a")
def test_wgmma_kernel_is_compared_in_a_step_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "9.0")
    steps = ("compare cuda", "compare cuda wgmma", "kernel_times cuda wgmma")
    done, found = rehearse(tmp_path, "--seconds", "1200", "--only", *steps)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert all(results(found)[step]["ok"] for step in steps)
    paths = [row["path"] for row in found if row["step"] == "compare" and "path" in row]
    assert set(paths[: paths.index("wgmma")]) == {"pairs", "small_m", "fused", "decode"}
    assert set(paths[paths.index("wgmma") :]) == {"wgmma"}
