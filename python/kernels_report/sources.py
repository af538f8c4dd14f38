"""Fingerprints of the kernels' code, by which the committed summary shows whether it is that of the present kernels.

They change with the code of a kernel or of a function that kernels call, and not with comments, docstrings or layout.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRITON = ROOT / "qlora_kernels" / "backends" / "triton"
CUDA = (ROOT / "csrc" / "cuda", ROOT / "csrc" / "include")


def fingerprints() -> str:
    """Return the line of the summary that names the code of both parts."""
    cuda = [path.read_text() for folder in CUDA for path in sorted([*folder.rglob("*.cu"), *folder.rglob("*.cuh")])]
    triton = [code for path in sorted(TRITON.glob("*.py")) for code in functions_on_the_gpu(path.read_text())]
    return f"Code of the kernels: Triton `{fingerprint(triton, '#')}`, CUDA `{fingerprint(cuda, '//')}`."


def functions_on_the_gpu(source: str) -> Iterator[str]:
    """Yield the code of each function of triton.jit, without its docstring."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            first = node.body[0]
            described = ast.get_docstring(node) is not None
            signature = lines[node.lineno - 1 : first.lineno - 1]
            yield "\n".join(signature + lines[(first.end_lineno if described else first.lineno - 1) : node.end_lineno])


def fingerprint(codes: list[str], comment: str) -> str:
    """Return 12 hexadecimal digits of the codes without comments and whitespace. comment: what begins one."""
    text = "\n".join(codes)
    text = re.sub(rf"{comment}[^\n]*", "", text)
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:12]
