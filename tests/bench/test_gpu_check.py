"""The runner of the GPU check on a machine without a GPU: time limits, skipped steps, rows and the summary."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_bundle
from bench.gpu_check import __main__ as check
from bench.gpu_check import claims, probe, rows
from qlora_kernels.backends.cuda import routing

STEP = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from bench.gpu_check.rows import Rows, step_arguments
module, backend = sys.argv.pop(1).split(".")[-1], sys.argv[sys.argv.index("--backend") + 1]
rows = Rows(step_arguments("A step.").out, module)
rows.add(backend=backend, capability=90)
"""
"""The beginning of every step that stands for one of the check: it writes a row."""


class Script:
    """A program that stands for every step; `does` sets what it does after its row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.does("")

    def does(self, code: str) -> None:
        self.path.write_text(STEP.format(root=str(check.ROOT)) + code)


class EndedByFile(subprocess.Popen[bytes]):
    """A process that reaches its time limit by making a file, however long it takes to make it."""

    def __init__(self, file: Path, *arguments: Any, **options: Any) -> None:
        self.file = file
        super().__init__(*arguments, **options)

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None:
            end = time.monotonic() + timeout
            while self.poll() is None and time.monotonic() < end:
                if self.file.exists():
                    self.file.unlink()
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.05)
        return super().wait(timeout)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    path = tmp_path / "step.py"
    monkeypatch.setattr(check, "PYTHON", [sys.executable, str(path)])
    return Script(path)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> tuple[int, list[rows.Row]]:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(out), *flags])
    code = check.main()
    return code, rows.read(out)


def by_name(found: list[rows.Row]) -> dict[str, rows.Row]:
    return {row["name"]: row for row in found if row["step"] == "run"}


def test_step_beyond_its_limit_is_ended_with_its_children(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step waits for its child, which keeps the write end of a pipe open as long as it runs."""
    started, (read_end, write_end) = tmp_path / "started", os.pipe()
    child = f"import time; open({str(started)!r}, 'w').close(); time.sleep(600)"
    script.does(f"import subprocess\nsubprocess.run([sys.executable, '-c', {child!r}], pass_fds=[{write_end}])")
    step = check.Step("smoke", "cuda", 60)
    monkeypatch.setattr(check.subprocess, "Popen", partial(EndedByFile, started, pass_fds=[write_end]))
    assert check.run_step(step, Namespace(out=tmp_path, tiny=False), 600.0, rows.Rows(tmp_path, "run")) is None
    row = rows.read(tmp_path)[-1]
    assert row["timed_out"]
    assert row["code"] is None
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        assert select.select([pipe], [], [], 300)[0], "the child runs on"  # the end of file, when it has ended


def test_other_backend_continues_after_failed_smoke_step(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that cannot be loaded: its smoke step fails, and none of its other steps begins."""
    script.does("sys.exit(backend == 'cuda' and module == 'smoke')")
    code, found = run(monkeypatch, tmp_path / "out")
    assert code == 1
    steps = by_name(found)
    assert steps["smoke cuda"]["ok"] is False
    assert steps["compare cuda"]["skipped"] == "the smoke step of cuda failed"
    assert steps["compare triton"]["ok"]
    assert steps["training triton"]["ok"]
    assert (tmp_path / "out" / "summary.txt").read_text().count("not measured") >= 8


@pytest.mark.parametrize(
    ("fault", "code"),
    [("time.sleep(600)", None), ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV), ("raise ValueError", 1)],
    ids=["hangs", "crashes", "raises"],
)
def test_failed_step_keeps_its_rows_and_others_continue(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, code: int | None
) -> None:
    reached = tmp_path / "reached"
    script.does(f"if (module, backend) == ('compare', 'cuda'):\n    open({str(reached)!r}, 'w').close()\n    {fault}")
    plan = (("compare", "cuda", 600), ("compare", "triton", 600), ("paging", "cuda", 600))
    steps = tuple(check.Step(*step) for step in plan)
    monkeypatch.setattr(check, "STEPS", steps)
    if code is None:
        monkeypatch.setattr(check.subprocess, "Popen", partial(EndedByFile, reached))
    exit_code, found = run(monkeypatch, tmp_path / "out")
    assert exit_code == 1
    ended = by_name(found)
    assert [ended[step.name]["ok"] for step in steps] == [False, True, True]
    assert ended["compare cuda"]["code"] == code
    assert ended["compare cuda"]["timed_out"] == (code is None)
    assert {"step": "compare", "backend": "cuda", "capability": 90} in found
    assert (tmp_path / "out" / "summary.txt").read_text().startswith("claim | predicted | measured\n")


def test_failed_step_of_another_library_is_no_failure_of_the_check(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes ends the process when one of its kernels fails."""
    script.does("if module == 'peer_times':\n    os._exit(1)")
    code, found = run(monkeypatch, tmp_path, "--only", "paging", "peer_times")
    assert code == 0
    assert by_name(found)["peer_times cuda"]["ok"] is False
    assert by_name(found)["paging cuda"]["ok"] is True


def test_steps_beyond_the_time_are_skipped(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LEAST_SECONDS", 1e9)
    code, found = run(monkeypatch, tmp_path / "out")
    assert code == 0
    assert all("s are left" in row["skipped"] for row in found if row["step"] == "run" and row["name"] != "probe cuda")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "rows.add(obstacle='no CUDA device is visible')\nsys.exit(2)",
            "no CUDA device is visible; nothing was checked",
        ),
        ("sys.exit(1)", "the probe step failed, see "),
    ],
)
def test_no_step_begins_without_a_gpu(
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    message: str,
) -> None:
    script.does(code)
    exit_code, found = run(monkeypatch, tmp_path)
    assert exit_code == 2
    assert list(by_name(found)) == ["probe cuda"]
    assert message in capsys.readouterr().err


def test_obstacles_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no CUDA device is visible" in (probe.obstacle() or "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA; set PYTHON" in (probe.obstacle() or "")
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        assert "has no numpy" in (probe.obstacle() or "")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "cannot import torch" in (probe.obstacle() or "")


def test_paths_that_no_default_takes_have_steps_of_their_own() -> None:
    steps = {(step.module, step.path) for step in check.STEPS if step.path}
    assert steps == {(module, path) for path in routing.ON_REQUEST for module in ("compare", "kernel_times")}


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
        {"step": "cache", "kernels": 102, "compiled": 3},
    ]
    text = claims.summary(found, 90)
    assert "cuda: every result equals the CPU's within its bound | all | 1 of 2" in text
    assert "cuda fused, 4096 x 4096, M=64, us | 8.7 | 9.0" in text
    assert "tokens/s | 1.21 (linears alone, M=4096) | 1.50" in text
    assert "Triton kernels compiled during the check, beside those of its cache | 0 | 3" in text
    assert "triton: every result equals the CPU's within its bound | all | not measured" in text
    assert next(line for line in text.splitlines() if "beats decode" in line).endswith("| 128")


def test_process_of_the_check_imports_no_torch(tmp_path: Path) -> None:
    """In a folder that has only bench/, so that an import of the package is an error."""
    shutil.copytree(
        gpu_bundle.ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__", "results")
    )
    code = "import sys; from bench.gpu_check import __main__; print({'torch', 'qlora_kernels'} & set(sys.modules))"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_bundle_runs_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "nothing was checked" in done.stderr


def test_failed_bundle_leaves_no_part_and_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    monkeypatch.setattr(gpu_bundle, "copy_packages", lambda folder: folder.mkdir() or [])
    monkeypatch.setattr(sys, "argv", ["gpu_bundle", "--out", str(out), "--python", "/bin/false"])
    for older in (False, True):
        if older:
            out.mkdir()
            (out / "bundle.json").write_text("older")
        with pytest.raises(subprocess.CalledProcessError):
            gpu_bundle.main()
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"] * older
    assert (out / "bundle.json").read_text() == "older"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--no-triton"])
    assert gpu_bundle.main() == 0
    assert json.loads((out / "bundle.json").read_text())["packages"] == []


INTERPRETER = """#!{python}
import importlib.util, json, os, sys
if sys.argv[1] == "-c":
    print(json.dumps({{"python": "3.12.1", "triton": "3.6.0"}}))
else:
    sys.path.insert(0, os.getcwd())  # as -m does
    found = {{name: importlib.util.find_spec(name).origin for name in {names}}}
    with open({record!r}, "w") as file:
        json.dump({{"arguments": sys.argv[1:], "found": found, "cache": os.environ["TRITON_CACHE_DIR"]}}, file)
"""
"""An interpreter that records what `python -m` would import."""


def test_triton_kernels_are_compiled_from_the_bundle(tmp_path: Path) -> None:
    """So that the interpreter with the machine's Triton needs no package that the bundle has."""
    out, record, python = tmp_path / "bundle", tmp_path / "record.json", tmp_path / "python"
    gpu_bundle.copy_packages(out)
    names = ("bench.gpu_bundle", "qlora_kernels", "safetensors", "python.kernels_report")
    python.write_text(INTERPRETER.format(python=sys.executable, names=names, record=str(record)))
    python.chmod(0o755)
    assert gpu_bundle.compile_triton(str(python), out, 90) == {"python": "3.12.1", "triton": "3.6.0"}
    recorded = json.loads(record.read_text())
    assert recorded["arguments"] == ["-m", "bench.gpu_check.warm_cache", "90"]
    assert recorded["cache"] == str(out / "triton-cache")
    folders = {name: Path(origin) for name, origin in recorded["found"].items()}
    assert all(folders[name].is_relative_to(out) for name in names[:3]), folders
    assert folders["python.kernels_report"].is_relative_to(gpu_bundle.ROOT)


def test_folder_other_than_bundle_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["gpu_bundle", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_bundle.main()
    assert (tmp_path / "notes.txt").read_text() == "kept"
