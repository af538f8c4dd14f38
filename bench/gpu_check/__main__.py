"""Runs the check: each step in a separate process with a time limit. Rows are written immediately, and a summary at the
end.

    python -m bench.gpu_check --out DIR [--seconds 570] [--only STEP ...] [--tiny]

Needs Python, torch and, for its backend, Triton; no network, no pip, no pytest. The exit code is 0 only if every step
passed; it is 2, with a message, without a GPU. A backend whose smoke step fails is skipped, and the other one is
checked. This process imports neither torch nor CUDA, so that a failing step cannot end it, and writes summary.txt after
each step. `make gpu-bundle` makes a folder with all required files; `python -m bench.gpu_check.full` is the long form.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .claims import summary
from .probe import NO_GPU
from .rows import Row, Rows, read

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
"""Runs a step's module."""

LEAST_SECONDS = 5.0
"""Seconds; a step is not started with less time left."""


TINY_PATIENCE = 10.0
"""Factor of the time limits in a rehearsal, which runs on an emulator."""


@dataclass(frozen=True)
class Step:
    """A module of this package, run as a process for at most `seconds`.

    backend: the backend whose smoke step must have passed.   path: the one path that is run, of those that no default
    takes; a kernel that ends the process then costs no row of the others.
    tool: a program that runs the step; the step is skipped if it is not on PATH.
    of_peer: whether the step runs another library. Its failure is written as a row and is not a failure of the check.
    """

    module: str
    backend: str
    seconds: float
    tool: tuple[str, ...] = ()
    of_peer: bool = False
    path: str = ""

    @property
    def name(self) -> str:
        """Name of the step in rows and messages."""
        return " ".join(filter(None, (*self.tool[:1], self.module, self.backend, self.path)))


SANITIZER = ("compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool")
PROFILER = ("ncu", "--set", "full", "--target-processes", "all", "-k", "regex:nf4|lora", "--launch-count", "12")

PROBE = Step("probe", "cuda", 60)

STEPS = (
    Step("smoke", "cuda", 40),
    Step("smoke", "triton", 60),
    Step("compare", "cuda", 40),
    Step("compare", "triton", 90),
    Step("smoke", "cuda", 40, (*SANITIZER, "memcheck")),
    Step("smoke", "cuda", 40, (*SANITIZER, "racecheck")),
    Step("kernel_times", "cuda", 90),
    Step("kernel_times", "triton", 90),
    Step("host_time", "cuda", 20),
    Step("host_time", "triton", 30),
    Step("training", "cuda", 60),
    Step("training", "triton", 60),
    Step("paging", "cuda", 40),
    Step("peer_times", "cuda", 60, of_peer=True),
    Step("compare", "cuda", 40, path="wgmma"),
    Step("kernel_times", "cuda", 40, path="wgmma"),
    Step("smoke", "cuda", 40, PROFILER),
)


def run_step(step: Step, arguments: argparse.Namespace, seconds: float, rows: Rows) -> int | None:
    """Run one step for at most `seconds`, and its whole process group with it.

    Returns its exit code, negative for a signal, or None if it ran too long.
    """
    command = [*step.tool, *PYTHON, f"bench.gpu_check.{step.module}", "--out", str(arguments.out)]
    command += ["--backend", step.backend, *(["--path", step.path] if step.path else [])]
    command += ["--tiny"] if arguments.tiny else []
    log = arguments.out / f"{step.name.replace(' ', '_')}.log"
    started = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.monotonic() - started
    rows.add(name=step.name, ok=code == 0, code=code, timed_out=code is None, seconds=round(took, 1), log=log.name)
    return code


def why_skipped(step: Step, unusable: set[str], left: float) -> str | None:
    """Return why a step is not started, or None. left: remaining seconds of the whole check."""
    if step.backend in unusable:
        return f"the smoke step of {step.backend} failed"
    if left < LEAST_SECONDS:
        return f"{left:.0f} s are left"
    if step.tool and shutil.which(step.tool[0]) is None:
        return f"{step.tool[0]} is not on PATH"
    return None


def cached_kernels() -> int:
    """Return the number of kernels in Triton's cache that TRITON_CACHE_DIR names; 0 without it."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    return sum(1 for _ in Path(folder).rglob("*.cubin")) if folder else 0


def write_summary(out: Path) -> str:
    """Write summary.txt from all rows so far, and return its text."""
    found: list[Row] = read(out)
    capability = next((row["capability"] for row in found if "capability" in row), 0)
    text = summary(found, capability)
    draft = out / "summary.partial"
    draft.write_text(text, encoding="utf-8")
    draft.replace(out / "summary.txt")
    return text


def main() -> int:
    """Run all steps of the check within --seconds, and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl, logs and summary.txt")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all steps together")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help="the steps' modules or names, such as smoke or 'compare cuda'"
    )
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: a rehearsal of the code")
    arguments = parser.parse_args()
    chosen = [s for s in STEPS if arguments.only is None or {s.module, s.name} & set(arguments.only)]
    if not chosen:
        parser.error(f"--only must name steps, got {arguments.only}; the steps are {', '.join(s.name for s in STEPS)}")
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.seconds
    patience = TINY_PATIENCE if arguments.tiny else 1.0
    rows = Rows(arguments.out, "run")
    if (code := run_step(PROBE, arguments, min(patience * PROBE.seconds, arguments.seconds), rows)) != 0:
        reasons = [row["obstacle"] for row in read(arguments.out) if "obstacle" in row]
        reason = (
            reasons[-1] if code == NO_GPU and reasons else f"the probe step failed, see {arguments.out}/probe_cuda.log"
        )
        sys.stderr.write(f"gpu-check: {reason}; nothing was checked\n")
        return NO_GPU
    failed: list[str] = []
    unusable: set[str] = set()
    prepared = cached_kernels()
    for step in chosen:
        left = deadline - time.monotonic()
        if (reason := why_skipped(step, unusable, left)) is not None:
            rows.add(name=step.name, skipped=reason)
            continue
        code = run_step(step, arguments, min(patience * step.seconds, left), rows)
        if code != 0 and not step.of_peer:
            failed.append(step.name)
            if step.module == "smoke" and not step.tool:
                unusable.add(step.backend)
        write_summary(arguments.out)
    if os.environ.get("TRITON_CACHE_DIR") and "triton" in {step.backend for step in chosen} - unusable:
        Rows(arguments.out, "cache").add(kernels=prepared, compiled=cached_kernels() - prepared)
    sys.stdout.write(write_summary(arguments.out))
    sys.stdout.write(f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'all passed'}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
