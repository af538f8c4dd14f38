"""The runner of the GPU check on a machine without a GPU: time limits, skipped steps, rows and the summary."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from bench import gpu_bundle
from bench.gpu_check import __main__ as check
from bench.gpu_check import claims, rows


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a program that stands for every step; a test writes what it does."""
    path = tmp_path / "step.py"
    monkeypatch.setattr(check, "PYTHON", [sys.executable, str(path)])
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check.torch.cuda, "get_device_capability", lambda: (9, 0))
    return path


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> tuple[int, list[rows.Row]]:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(out), *flags])
    code = check.main()
    return code, rows.read(out)


def test_step_beyond_its_limit_is_ended_with_its_children(script: Path, tmp_path: Path) -> None:
    script.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])")
    step = check.Step("smoke", "cuda", 60)
    assert not check.run_step(step, Namespace(out=tmp_path, tiny=False), 1.0, rows.Rows(tmp_path, "run"))
    (row,) = rows.read(tmp_path)
    assert row["timed_out"]
    assert row["code"] is None


def test_other_backend_goes_on_after_a_failed_smoke_step(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text("import sys\nsys.exit('cuda' in sys.argv)")
    code, found = run(monkeypatch, tmp_path / "out")
    assert code == 1
    by_name = {row["name"]: row for row in found}
    assert by_name["smoke cuda"]["ok"] is False
    assert by_name["compare cuda"]["skipped"] == "the smoke step of cuda failed"
    assert by_name["compare triton"]["ok"]
    assert by_name["training triton"]["ok"]
    assert (tmp_path / "out" / "summary.txt").read_text().count("not measured") >= 8


def test_steps_beyond_the_time_are_skipped(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write_text("")
    code, found = run(monkeypatch, tmp_path / "out", "--seconds", "0")
    assert code == 0
    assert all("s are left" in row["skipped"] for row in found)


def test_exit_code_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, tmp_path)[0] == 2


def test_limits_of_the_steps_are_reached_by_none_alone() -> None:
    assert all(step.seconds <= 90 for step in check.STEPS)


def test_rows_survive_a_line_cut_short(tmp_path: Path) -> None:
    rows.Rows(tmp_path, "times").add(us=1.0)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"step": "tim')
    assert rows.read(tmp_path) == [{"step": "times", "us": 1.0}]


def test_claims_are_answered_by_rows() -> None:
    kernel = {"step": "times", "backend": "cuda", "N": 4096, "K": 4096}
    found = [
        *(kernel | {"path": "fused", "M": M, "us": us} for M, us in ((64, 9.0), (128, 15.0), (256, 40.0))),
        *(kernel | {"path": "decode", "M": M, "us": us} for M, us in ((64, 31.0), (128, 32.0), (256, 33.0))),
        {"step": "compare", "backend": "cuda", "ok": True},
        {"step": "compare", "backend": "cuda", "ok": False},
        {"step": "training", "way": "fused op", "dropout": 0.0, "tokens_per_s": 300.0},
        {"step": "training", "way": "by parts", "dropout": 0.0, "tokens_per_s": 200.0},
    ]
    text = claims.summary(found, 90)
    assert "cuda: every result equals the CPU's within its bound | all | 1 of 2" in text
    assert "cuda fused, 4096 x 4096, M=64, us | 8.7 | 9.0" in text
    assert "tokens/s | 1.21 (linears alone, M=4096) | 1.50" in text
    assert "triton: every result equals the CPU's within its bound | all | not measured" in text
    assert next(line for line in text.splitlines() if "beats decode" in line).endswith("| 128")


def test_bundle_runs_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the check says so; all that it imported lay in the bundle."""
    out = tmp_path / "bundle"
    monkeypatch.setattr(sys, "argv", ["gpu_bundle", "--out", str(out), "--no-triton"])
    monkeypatch.setattr(gpu_bundle, "INSTALLED", ("safetensors",))
    assert gpu_bundle.main() == 0
    assert json.loads((out / "bundle.json").read_text())["packages"] == ["safetensors"]
    command = ["sh", str(out / "run.sh"), str(tmp_path / "results")]
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "no CUDA device" in done.stderr


def test_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["gpu_bundle", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_bundle.main()
    assert (tmp_path / "notes.txt").read_text() == "kept"
