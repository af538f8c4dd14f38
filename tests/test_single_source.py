"""The values of the NF4 code are written only in format/nf4.py; generated files match their generators."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from qlora_kernels.format import nf4

ROOT = Path(__file__).parents[1]
SPECIFICATION = ROOT / "qlora_kernels" / "format" / "nf4.py"
GENERATED = {ROOT / "csrc" / "include" / "qlora" / "nf4_code.h"}
SUFFIXES = {".py", ".h", ".cuh", ".cpp", ".cu", ".toml"}
FOLDERS = ("qlora_kernels", "csrc", "python", "tests", "bench")


def test_no_second_copy_of_the_code():
    """No code value except 0 and +-1 is written in another file, not even with fewer digits."""
    digits = {f"{abs(value):.6f}"[:8] for value in nf4.CODE if 0 < abs(value) < 1}
    pattern = re.compile("|".join(re.escape(d) for d in sorted(digits)))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in SUFFIXES or path == SPECIFICATION or path in GENERATED or path == Path(__file__):
                continue
            found = pattern.search(path.read_text(errors="replace"))
            assert found is None, f"{path.relative_to(ROOT)} repeats the code value {found.group() if found else ''}"


def test_format_maps_independent_of_cpu():
    """On CPUs for which torch has no fused multiply-adds, Python computes the values the kernels were compiled with."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-m", "python.codegen.nf4_header", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
