"""Checks that the wheels of a folder match their names, install and compute.

    python -m python.build_support.check_wheels dist [ENVIRONMENT ...]

Without running a wheel, it checks: one wheel for every CPython from 3.10 on, a manylinux tag, at most 10 MB for each
architecture, libraries without symbols of Python, and every kernel compiled for every architecture of the version. Then
the wheel is installed into a new virtual environment for each ENVIRONMENT and imported, and the CPU kernels are run.

ENVIRONMENT: INTERPRETER=REQUIREMENT, like python3.12=torch==2.12.0; or INTERPRETER alone, whose installed torch is
used.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .cuda import SM90A_SOURCES

MAX_BYTES_PER_ARCH = 10_000_000

NAME = re.compile(
    r"qlora_kernels-(?P<version>[\d.]+\+(?:cpu|cu\d+(?P<archs>(?:\.sm\d+[af]?)+)))-cp310-abi3-manylinux_\d+_\d+_\w+\.whl"
)
CPU_LIBRARY, CUDA_LIBRARY = (f"qlora_kernels/backends/{name}/_C.abi3.so" for name in ("cpu", "cuda"))
SMOKE = Path(__file__).with_name("wheel_smoke.py")


class BadWheel(Exception):
    """A wheel failed a check; the message describes the failure."""


def archs_of(wheel: Path) -> list[str]:
    """Return the architectures in the wheel's name, such as ["sm_80", "sm_90a"]. Raises BadWheel for another name."""
    match = NAME.fullmatch(wheel.name)
    if match is None:
        raise BadWheel(f"{wheel.name}: the name does not match {NAME.pattern}")
    return [f"sm_{arch}" for arch in re.findall(r"\.sm(\d+[af]?)", match["archs"] or "")]


def check_content(wheel: Path) -> str:
    """Run the checks that need no installation, and return a line about the wheel. Raises BadWheel."""
    archs, size = archs_of(wheel), wheel.stat().st_size
    limit = MAX_BYTES_PER_ARCH * max(len(archs), 1)
    if size > limit:
        raise BadWheel(f"{wheel.name}: {size / 1e6:.1f} MB, the limit is {limit / 1e6:.0f}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as content:
        libraries = sorted(name for name in content.namelist() if name.endswith(".so"))
        expected = [CPU_LIBRARY, *([CUDA_LIBRARY] if archs else [])]
        if libraries != expected:
            raise BadWheel(f"{wheel.name}: holds the libraries {libraries}, expected {expected}")
        paths = [Path(content.extract(name, folder)) for name in libraries]
        for path in paths:
            if symbols := python_symbols(path):
                raise BadWheel(f"{wheel.name}: {path.parent.name} uses {', '.join(sorted(symbols))} of one Python")
        kernels = check_kernels(paths[1], archs) if archs else 0
        if archs:
            check_runtime(paths[1], wheel.name)
    for_archs = f", {kernels} kernels for each of {', '.join(archs)}" if archs else ""
    return f"{wheel.name}: {size / 1e6:.2f} MB{for_archs}"


def check_kernels(library: Path, archs: list[str]) -> int:
    """Return the number of kernels for each of `archs` in `library`. Raises BadWheel if they differ.

    The kernels of SM90A_SOURCES are there for sm_90a, where that or sm_90 is one of `archs`, and for nothing else.
    """
    kernels = kernels_by_arch(library)
    hopper = {arch for arch in ("sm_90a",) if {"sm_90", "sm_90a"} & set(archs)}
    everywhere = {name for names in kernels.values() for name in names if not _is_sm90a_kernel(name)}
    missing = {arch: sorted(everywhere - kernels.get(arch, set())) for arch in archs}
    misplaced = {arch for arch, names in kernels.items() if any(map(_is_sm90a_kernel, names))} ^ hopper
    if set(kernels) != {*archs, *hopper} or any(missing.values()) or misplaced or not everywhere:
        raise BadWheel(
            f"{library}: compiled for {sorted(kernels)}, said to be for {archs}; missing: {missing}; "
            f"{', '.join(SM90A_SOURCES)} missing or misplaced: {sorted(misplaced)}"
        )
    return len(everywhere)


def _is_sm90a_kernel(name: str) -> bool:
    return any(f"{stem}_kernel" in name for stem in SM90A_SOURCES)


def check_runtime(library: Path, wheel_name: str) -> None:
    """Raise BadWheel unless the CUDA library uses torch's libcudart of the version in the wheel's name."""
    major = re.search(r"\+cu(\d\d)\d", wheel_name)
    expected = f"libcudart.so.{major[1]}" if major else "libcudart"
    needed = needed_libraries(library)
    if expected not in needed:
        raise BadWheel(f"{wheel_name}: the CUDA library must need {expected}, it needs {', '.join(sorted(needed))}")


def needed_libraries(library: Path) -> set[str]:
    """Return the names of the shared libraries that `library` is linked to."""
    listing = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.+?)\]", listing))


def python_symbols(library: Path) -> set[str]:
    """Return the symbols of the interpreter that `library` needs."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"\b_?Py[A-Z_]\w*", listing))


def kernels_by_arch(library: Path) -> dict[str, set[str]]:
    """Return architecture -> mangled names of its kernels, as cuobjdump lists them."""
    from ..kernels_report.sass import TOOLS  # needs triton's wheel, which contains cuobjdump

    command = [str(TOOLS / "cuobjdump"), "-res-usage", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, set[str]] = {}
    arch = ""
    for line in (listing.stdout + listing.stderr).splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
            found.setdefault(arch, set())
        elif match := re.match(r"\s*Function (\w+):", line):
            found[arch].add(match[1])
    return found


def check_installed(wheel: Path, environment: str) -> str:
    """Install `wheel` into a new virtual environment, run wheel_smoke.py there, and return its output."""
    interpreter, _, requirement = environment.partition("=")
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder) / "venv"
        subprocess.run([interpreter, "-m", "venv", venv], check=True)
        python = venv / "bin" / "python"
        if requirement:
            packages = [requirement, str(wheel.resolve())]
        else:
            lend_packages(interpreter, python)
            packages = ["--no-deps", "--ignore-installed", str(wheel.resolve())]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        # -I: import only the installed package, independent of this process's folder and variables.
        smoke: list[str | Path] = [python, "-I", SMOKE, *archs_of(wheel)]
        done = subprocess.run(smoke, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BadWheel(f"{wheel.name} with {environment}:\n{done.stdout}{done.stderr}")
        output: str = done.stdout.strip()
        return output


def lend_packages(interpreter: str, to: Path) -> None:
    """Make the packages of `interpreter` importable in the environment of `to`."""
    lent, own = (
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
        for python, code in (
            (interpreter, "import sys; print(*(p for p in sys.path if p.endswith('site-packages')), sep='\\n')"),
            (to, "import sysconfig; print(sysconfig.get_paths()['purelib'], end='')"),
        )
    )
    Path(own, "borrowed.pth").write_text(lent, encoding="utf-8")


def main() -> int:
    """Check the wheels; return 1 if one fails."""
    folder, *environments = sys.argv[1:]
    wheels = sorted(Path(folder).glob("*.whl"))
    try:
        if not wheels:
            raise BadWheel(f"{folder} holds no wheel")
        for wheel in wheels:
            print(check_content(wheel), flush=True)
            for environment in environments:
                print(f"  {check_installed(wheel, environment)}", flush=True)
    except BadWheel as reason:
        print(reason, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
