"""Run the check: each step in a process under its own time limit, rows on disk at once, a summary at the end.

    python -m bench.gpu_check --out DIR [--seconds 570] [--tiny]

Needs Python, torch and, for its backend, Triton; no network, no pip, no pytest. The exit code is 0 only if every step
passed; it is 2, with a message, without a GPU. A backend whose smoke step fails is left out, and the other one goes on.
`make gpu-bundle` makes a folder that holds everything; `python -m bench.gpu_check.full` is the long form.
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

import torch

from .claims import summary
from .rows import Rows, read

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
"""Runs a step's module."""

LEAST_SECONDS = 5.0
"""A step with less time left is not begun."""


@dataclass(frozen=True)
class Step:
    """A module of this package, run as a process. backend: whose smoke step must have passed, or None for both."""

    module: str
    backend: str
    seconds: float
    tool: tuple[str, ...] = ()
    """A program that runs the step, left out where it is not on PATH."""

    @property
    def name(self) -> str:
        """What rows and messages call the step."""
        return " ".join((*self.tool[:1], self.module, self.backend))


SANITIZER = ("compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool")
PROFILER = ("ncu", "--set", "full", "--target-processes", "all", "-k", "regex:nf4|lora", "--launch-count", "12")

STEPS = (
    Step("smoke", "cuda", 40),
    Step("smoke", "triton", 60),
    Step("compare", "cuda", 40),
    Step("compare", "triton", 90),
    Step("smoke", "cuda", 40, (*SANITIZER, "memcheck")),
    Step("smoke", "cuda", 40, (*SANITIZER, "racecheck")),
    Step("kernel_times", "cuda", 90),
    Step("kernel_times", "triton", 90),
    Step("training", "cuda", 60),
    Step("training", "triton", 60),
    Step("paging", "cuda", 40),
    Step("smoke", "cuda", 40, PROFILER),
)


def run_step(step: Step, arguments: argparse.Namespace, seconds: float, rows: Rows) -> bool:
    """Run one step for at most `seconds`; whether it ended with success. Its whole process group ends with it."""
    command = [*step.tool, *PYTHON, f"bench.gpu_check.{step.module}", "--out", str(arguments.out)]
    command += ["--backend", step.backend, *(["--tiny"] if arguments.tiny else [])]
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
    return code == 0


def main() -> int:
    """Run all steps of the check within --seconds, and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl, logs and summary.txt")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all steps together")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: a rehearsal of the code")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        sys.stderr.write("gpu-check: no CUDA device is visible to torch; nothing was checked\n")
        return 2
    deadline = time.monotonic() + arguments.seconds
    rows, failed, unusable = Rows(arguments.out, "run"), [], set()
    for step in STEPS:
        left = deadline - time.monotonic()
        skipped = (
            f"the smoke step of {step.backend} failed"
            if step.backend in unusable
            else f"{left:.0f} s are left"
            if left < LEAST_SECONDS
            else f"{step.tool[0]} is not on PATH"
            if step.tool and shutil.which(step.tool[0]) is None
            else None
        )
        if skipped is not None:
            rows.add(name=step.name, skipped=skipped)
            continue
        if not run_step(step, arguments, min(step.seconds, left), rows):
            failed.append(step.name)
            if step.module == "smoke" and not step.tool:
                unusable.add(step.backend)
    major, minor = torch.cuda.get_device_capability()
    text = summary(read(arguments.out), 10 * major + minor)
    (arguments.out / "summary.txt").write_text(text, encoding="utf-8")
    sys.stdout.write(text + f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'all passed'}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
