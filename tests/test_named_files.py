"""Files that comments, docstrings and pages name by a path from the root of the repository exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("qlora_kernels", "csrc", "bench", "python", "tests", "docs")
NAMED = re.compile(
    rf"(?<![\w./<-])((?:{'|'.join(TOPS)})/[\w./-]*\w\.(?:py|h|cpp|cu|cuh|md|json|jsonl|safetensors|yml))\b"
)
INSIDE_PACKAGE = re.compile(r"(?<![\w./<-])((?:ops|format|backends|nn|optim|io|integrations)/[\w/]*\w\.py)\b")
WITH_EXAMPLES = ("tests/test_named_files.py", "tests/docs/test_links.py")
"""Tests that name files which do not exist."""
GENERATED = {"docs/kernels/report.md", "docs/kernels/report.json"}


def missing_files(text: str) -> list[str]:
    """Return the paths in `text` without a file. Paths such as ops/philox.py are below qlora_kernels."""
    named = set(NAMED.findall(text)) | {f"qlora_kernels/{path}" for path in INSIDE_PACKAGE.findall(text)}
    examples = {path for path in named if "NAME" in path}
    return sorted(path for path in named - examples - GENERATED if not (ROOT / path).exists())


def test_missing_file_is_found() -> None:
    text = "see qlora_kernels/ops/_philox.py, ops/philox.py and docs/kernels/cpu.md; out/docs/none.md is not ours"
    assert missing_files(text) == ["qlora_kernels/ops/_philox.py"]


def test_named_files_exist() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh", ".md")
    paths = [ROOT / line for line in tracked.stdout.splitlines() if line.endswith(suffixes)]
    found = {
        str(path.relative_to(ROOT)): missing_files(path.read_text(encoding="utf-8")) for path in paths if path.exists()
    }
    for name in WITH_EXAMPLES:
        found.pop(name, None)
    assert {name: paths for name, paths in found.items() if paths} == {}
