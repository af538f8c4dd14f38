"""Runs the tests that need a CUDA build of torch, in a separate environment: `make test-cuda-torch`.

    python -m tests.support.fake_cuda ENVIRONMENT_FOLDER

The environment is made with this interpreter if it is missing or out of date. Then tests/gpu and tests/fake_cuda run on
the fake device, and the CPU tests of the ops and the gates of Triton's kernels under that torch. If it cannot be
made, the reason is printed and the exit code is 0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from qlora_kernels.backends import cuda
from tests.support.cuda_host import nvcc_missing
from tests.support.free_memory import free_bytes

REQUIREMENTS = ("torch==2.14.1", "numpy", "safetensors>=0.4", "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
"""torch from PyPI is a CUDA build."""

NEEDED_BYTES = 12 << 30
"""Disk space: 5.5 GB installed, the packages themselves while pip works, and a reserve."""

WORKER_BYTES = 3 << 29
"""Memory per process: a test process takes up to 1.1 GiB, a compiler of translated kernels 0.4."""

ON_THE_FAKE_DEVICE = ("-p", "tests.support.fake_cuda.pytest_plugin", "tests/gpu", "tests/fake_cuda")
AS_IT_IS = ("tests/ops", "tests/cuda/test_platform.py", "tests/kernels_report/test_gates.py")
"""Tests without the fake device. The last ones compile kernels by this torch's version of Triton."""


class CannotRun(Exception):
    """These tests are skipped; the message is the reason."""


def report(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def environment(folder: Path) -> Path:
    """Return the environment's interpreter, installed if the folder lacks REQUIREMENTS. Raises CannotRun."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = f"{sys.version_info[:2]} {' '.join(REQUIREMENTS)}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if not folder.exists() and free < NEEDED_BYTES:
        raise CannotRun(f"a CUDA build of torch needs {NEEDED_BYTES >> 30} GB of disk, {free >> 30} GB are free")
    report(f"installing {' '.join(REQUIREMENTS)} into {folder}")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *REQUIREMENTS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotRun(f"pip cannot install {REQUIREMENTS[0]}: {done.stderr.strip().splitlines()[-1]}")
    version = subprocess.run(
        [python, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not version.startswith("13."):
        raise CannotRun(f"pip's {REQUIREMENTS[0]} is built with CUDA {version}, the tests need CUDA 13")
    stamp.write_text(wanted)
    return python


def library_with_faults(variables: Mapping[str, str]) -> str:
    """Return the path of the CUDA library with planted faults, compiled if needed."""
    command = [sys.executable, "-m", "tests.fake_cuda.planted"]
    return subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def processes() -> int:
    """Return the number of processes: one per core, limited by memory."""
    cores, free = os.cpu_count() or 1, free_bytes()
    return cores if free is None else max(1, min(cores, free // WORKER_BYTES))


def main() -> int:
    try:
        if (missing := nvcc_missing()) is not None:
            raise CannotRun(missing)
        if not cuda.LIBRARY.exists():
            raise CannotRun(f"{cuda.LIBRARY.name} is not built; run `make ext`")
        python = environment(Path(sys.argv[1]))
    except CannotRun as reason:
        report(f"test-cuda-torch is skipped: {reason}")
        return 0
    variables = os.environ | {"OMP_WAIT_POLICY": "passive", "MAX_JOBS": os.environ.get("MAX_JOBS", str(processes()))}
    build = [sys.executable, "-m", "tests.support.fake_cuda.build"]
    folder = subprocess.run(build, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    variables["FAKE_CUDA_FOLDER"] = folder
    variables["FAKE_CUDA_PLANTED"] = library_with_faults(variables)
    for selection in (ON_THE_FAKE_DEVICE, AS_IT_IS):
        command = [python, "-m", "pytest", "-q", "-n", str(processes()), *selection]
        code = subprocess.run(command, env=variables).returncode
        if code < 0:
            report(f"pytest was ended by signal {-code}; 9 is what the kernel sends where memory runs out")
        if code != 0:
            return abs(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
