"""Weak stubs of the functions in CUDA's headers that the fake device lacks; they report "not supported".

This module also makes the table for cuGetProcAddress: each driver function with the versions of its binary interface.
cudaTypedefs.h has a type PFN_<name>_v<version> for each; in order from the newest, they belong to the exported suffixes
_v3, _v2, none.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

_HEAD = '#include <stddef.h>\n#include "plugin.h"\n'


def driver_stubs(include: Path) -> str:
    """Return C source for libcuda.so.1: stubs and the table `fake_cuda_entries`."""
    names = _declared(include, "cuda.h", r"\bCUresult\s+(cu[A-Z]\w*)\s*\(", "-D__CUDA_API_VERSION_INTERNAL")
    entries = "\n".join(
        f'    {{"{name}", {version}, "{exported}"}},' for name, version, exported in _table(include, names)
    )
    table = "const struct { const char *name; int version; const char *exported; } fake_cuda_entries[] = {\n"
    return f"{_HEAD}{_stubs(names)}\n{table}{entries}\n    {{NULL, 0, NULL}},\n}};\n"


def runtime_stubs(include: Path) -> str:
    """Return C source for libcudart.so.13."""
    names = _declared(include, "cuda_runtime_api.h", r"\bcudaError_t\s+(cuda[A-Z]\w*)\s*\(")
    return f"{_HEAD}{_stubs(names)}\n"


def _declared(include: Path, header: str, pattern: str, *flags: str) -> list[str]:
    command = ["gcc", "-E", "-P", f"-I{include}", *flags, "-x", "c", "-"]
    text = subprocess.run(command, input=f"#include <{header}>\n", capture_output=True, text=True, check=True).stdout
    return sorted(name for name in set(re.findall(pattern, text)) if not name.endswith(("_ptds", "_ptsz")))


def _stubs(names: list[str]) -> str:
    line = '__attribute__((weak, visibility("default"))) int {0}(void) {{ return fake_cuda_unsupported("{0}"); }}'
    return "\n".join(line.format(name) for name in names)


def _table(include: Path, names: list[str]) -> list[tuple[str, int, str]]:
    """Return (name, version, exported name), the newest version of each name first."""
    versions, suffixes = defaultdict(set), defaultdict(list)
    for name, version in re.findall(r"\bPFN_(cu[A-Za-z0-9]\w*?)_v(\d+)\)", (include / "cudaTypedefs.h").read_text()):
        versions[name].add(int(version))
    for exported in names:
        match = re.fullmatch(r"(\w+?)_v(\d+)", exported)
        name, suffix = (match[1], int(match[2])) if match else (exported, 1)
        suffixes[name].append((suffix, exported))
    rows = []
    for name, exports in sorted(suffixes.items()):
        newest_first = sorted(versions.get(name, {0}), reverse=True)
        for (_, exported), version in zip(sorted(exports, reverse=True), newest_first, strict=False):
            rows.append((name, version, exported))
    return rows
