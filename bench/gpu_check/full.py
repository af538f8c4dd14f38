"""All checks that need a GPU, in one command: `make gpu-check`.

    1. the GPU tests (tests/gpu): results, opcheck, CUDA graphs, torch.compile
        2. the results again under compute-sanitizer, if it is installed
    3. the microbenchmarks against bitsandbytes, dense torch and PEFT

Writes bench/results/<gpu>.jsonl. The exit code is 0 only if all parts passed; without a GPU it is 2, with a message.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path("bench") / "results"

SANITIZED = "test_codec and 9001 or test_every_path"
"""The tests that run under compute-sanitizer: every kernel once, because it is about a hundred times slower."""


def commands(results: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (what it checks, command) for each part."""
    python = sys.executable
    yield "GPU tests", [python, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("gpu-check: compute-sanitizer is not on PATH: memory checks are left out")
    else:
        for tool in ("memcheck", "racecheck"):
            check = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
            yield f"compute-sanitizer {tool}", [*check, python, "-m", "pytest", "-q", "tests/gpu", "-k", SANITIZED]
    yield "microbenchmarks", [python, "-m", "bench.run", "cuda", "--out", str(results)]


def main() -> int:
    """Run the parts in order, all of them even if one fails."""
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device is visible to torch; nothing was checked", file=sys.stderr)
        return 2
    gpu = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_")
    results = RESULTS / f"{gpu}.jsonl"
    (ROOT / RESULTS).mkdir(parents=True, exist_ok=True)
    failed = []
    for title, command in commands(results):
        print(f"gpu-check: {title}: {' '.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            failed.append(title)
    print(f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'all passed'}; figures in {results}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
