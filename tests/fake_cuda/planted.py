"""Compiles the CUDA library with faults in its bindings, each behind a condition: one compilation for all faults.

    python -m tests.fake_cuda.planted      prints the library's path

The environment variable ACTIVE names the fault that acts. Beside the library, faults.txt lists all names:

    guard FILE:FUNCTION      the device of the operands is not made the current one
    stream FILE:FUNCTION     the kernel is launched on the null stream instead of torch's current stream
    LOOKUP                   torch's stream function is searched among the global symbols only
    NOT_CLEARED              the runtime keeps the error of a failed call

Every DeviceGuard and every use of the current stream in csrc/bindings is a fault, so that new bindings are included.
The kernels are those of the last build of the library in this checkout.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.cuda_host.build import cached, run_compiler
from tests.support.cuda_host.toolchain import ROOT, versions

if TYPE_CHECKING:
    from python.build_support.native import Step

ACTIVE = "QLORA_PLANTED_FAULT"
LOOKUP = "lookup"
NOT_CLEARED = "error not cleared"
NAMES = "faults.txt"

_BINDINGS = ROOT / "csrc" / "bindings"
_FUNCTION = re.compile(r"^\w[\w:<>&* ]*?(\w+)\(", re.MULTILINE)
_GUARD = re.compile(r"const DeviceGuard guard\((.+)\);")
_STREAM = re.compile(r"(?<!\w)current_stream\((\w+)\)")
_USING_GUARD = "using torch::stable::accelerator::DeviceGuard;\n"
_HELPERS = f"""
inline bool planted(const char* fault) {{
    const char* const active = getenv("{ACTIVE}");
    return active && strcmp(active, fault) == 0;
}}

struct DeviceGuard {{
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    DeviceGuard(int32_t device, const char* fault) {{
        if (!planted(fault)) guard.emplace(device);
    }}
}};
"""


class CannotPlant(Exception):
    """The library with faults cannot be compiled; the message is the reason."""


def build() -> Path:
    """Return the library, compiled if needed. Raises CannotPlant or CompilerError."""
    from python.build_support.cuda import CudaLibrary  # needs setuptools, which an environment for tests may lack

    library = CudaLibrary()
    built = Path(os.path.relpath(ROOT / "build" / "native" / library.name))  # as setup.py names it in its commands
    steps = library.compile_steps(built)
    bindings = [step for step in steps if step.output.parent.name == "bindings"]
    kernels = [step for step in steps if step not in bindings]
    if stale := [step.output.name for step in kernels if not step.is_current()]:
        raise CannotPlant(f"{', '.join(stale)} in {built} must be up to date; run `make ext`")
    digest = hashlib.sha256(versions().encode())
    for path in (Path(__file__), *sorted(_BINDINGS.iterdir()), *(step.output for step in kernels)):
        digest.update(path.read_bytes())

    def make(folder: Path) -> None:
        sources = folder / "bindings"
        shutil.copytree(_BINDINGS, sources)
        (folder / NAMES).write_text("".join(f"{name}\n" for name in _plant(sources)))
        commands = [_moved(step, sources, folder) for step in bindings]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(run_compiler, commands))
        objects = [*(step.output for step in kernels), *(folder / step.output.name for step in bindings)]
        link = library.link_step(objects, folder / "_C.abi3.so")
        run_compiler(list(link.command))

    return cached(f"planted-{digest.hexdigest()[:24]}", "", make) / "_C.abi3.so"


def _moved(step: Step, sources: Path, folder: Path) -> list[str]:
    """Return the command of `step` for the sources in `sources`, without optimization."""
    (source,) = step.inputs
    places = {source: sources / source.name, step.output: folder / step.output.name}
    if step.dependency_file is not None:
        places[step.dependency_file] = folder / step.dependency_file.name
    renamed = {str(old): str(new) for old, new in places.items()}
    return [*(renamed.get(word, word) for word in step.command), "-O0"]


def _plant(sources: Path) -> list[str]:
    """Add every fault to the sources; return the faults' names."""
    names = [LOOKUP, NOT_CLEARED]
    header, platform = sources / "cuda_tensors.h", sources / "cuda_platform.cpp"
    _replace(header, _USING_GUARD, _HELPERS)
    _replace(
        header,
        "#include <string>\n",
        "#include <cstdlib>\n#include <cstring>\n#include <optional>\n#include <string>\n",
    )
    _replace(header, "    cudaGetLastError();\n", f'    if (!planted("{NOT_CLEARED}")) cudaGetLastError();\n')
    _replace(platform, "torch_cuda ? dlsym", f'torch_cuda && !planted("{LOOKUP}") ? dlsym')
    for path in sorted(sources.glob("cuda_*.cpp")):
        if path == platform:  # defines current_stream
            continue
        text, found = _mark(
            path.read_text(), _GUARD, f"guard {path.name}", 'const DeviceGuard guard({argument}, "{fault}");'
        )
        names += found
        text, found = _mark(text, _STREAM, f"stream {path.name}", '(planted("{fault}") ? nullptr : {call})')
        names += found
        path.write_text(text)
    return names


def _mark(text: str, pattern: re.Pattern[str], kind: str, replacement: str) -> tuple[str, list[str]]:
    """Replace each match by its fault's condition; return the text and the names of the faults."""
    names: list[str] = []

    def marked(match: re.Match[str]) -> str:
        function = _FUNCTION.findall(text, 0, match.start())[-1]
        names.append(f"{kind}:{function}")
        return replacement.format(fault=names[-1], argument=match[1], call=match[0])

    return pattern.sub(marked, text), names


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} must contain {old!r} once: bring planted.py up to date"
    path.write_text(text.replace(old, new), encoding="utf-8")


def main() -> int:
    """Print the library's path, or the reason why there is none; return the exit code."""
    try:
        sys.stdout.write(f"{build()}\n")
    except CannotPlant as reason:
        sys.stderr.write(f"{reason}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
