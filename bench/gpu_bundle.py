"""Makes a folder with everything that `make gpu-check` needs on a machine without network and pip.

    python -m bench.gpu_bundle --arch 90 --out out/gpu-bundle [--python PATH]        then, there: sh run.sh RESULTS

It contains the package with its compiled libraries, bench/, and the installed packages safetensors, bitsandbytes and
packaging, which bitsandbytes imports; their binaries run under every Python 3. numpy and torch are the machine's.

Triton's kernels are compiled for the GPU into triton-cache. Triton uses a cached kernel only under the Python and the
Triton that compiled it, because its keys contain a hash of its own library, of which each Python has another one.
--python therefore names an interpreter with the machine's versions of Python, torch and Triton; under other versions
Triton compiles the kernels again. bundle.json lists the contents.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = ("qlora_kernels", "bench")
INSTALLED = ("safetensors", "bitsandbytes", "packaging")
OTHER_LIBRARIES = ("cuda11", "cuda12", "rocm", "xpu", "hpu")
"""bitsandbytes' libraries for other versions of CUDA and other devices, which are left out."""

VERSIONS = """
import importlib.metadata, json, platform
found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version()} | {n: found[n] for n in ("torch", "triton") if n in found}))
"""
"""Prints the versions that Triton's cache belongs to, and torch's."""

RUN = """#!/bin/sh
# sh run.sh RESULTS [--only STEP ...]: the check, within ten minutes. PYTHON names another interpreter.
# Exit code: 0 if every step passed, 1 if one failed, 2 if there is no interpreter, no torch or no GPU.
python="${PYTHON:-python3}"
if ! command -v "$python" > /dev/null; then
    echo "gpu-check: $python is not on PATH; set PYTHON to an interpreter with a CUDA build of torch" >&2
    exit 2
fi
out=$(mkdir -p "${1:-results}" && cd "${1:-results}" && pwd) || exit 2
if [ $# -gt 0 ]; then shift; fi
cd "$(dirname "$0")" || exit 2
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/triton-cache}" PYTHONPATH="$PWD" PYTHONDONTWRITEBYTECODE=1
exec "$python" -m bench.gpu_check --out "$out" "$@"
"""


def capability(text: str) -> int:
    """Return 90 for "90" and for "90a", as QLORA_CUDA_ARCHS names an architecture."""
    return int(text.rstrip("af"))


def copy_packages(out: Path) -> list[str]:
    """Copy this project's packages and the installed ones; return the names of the installed ones that were found."""
    unused = ("__pycache__", "*.pyc", "results", *(f"libbitsandbytes_{kind}*" for kind in OTHER_LIBRARIES))
    ignored = shutil.ignore_patterns(*unused)
    for name in OWN:
        shutil.copytree(ROOT / name, out / name, ignore=ignored)
    found = []
    for name in INSTALLED:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            shutil.copytree(Path(spec.origin).parent, out / name, ignore=ignored)
            found.append(name)
    return found


def compile_triton(python: str, out: Path, arch: int) -> dict[str, str] | None:
    """Compile the check's kernels into the bundle's cache by an interpreter, which needs torch, Triton and numpy alone.

    The bundle's own packages are compiled, beside them python/kernels_report of this checkout.
    Returns its versions of Python, torch and Triton; None if it has no Triton.
    """
    listing = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    versions: dict[str, str] = json.loads(listing)
    if "triton" not in versions:
        return None
    variables = {
        "TRITON_CACHE_DIR": str(out / "triton-cache"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [python, "-m", "bench.gpu_check.warm_cache", str(arch)]
    subprocess.run(command, cwd=out, env=os.environ | variables, check=True)
    return versions


def write_bundle(out: Path, arch: int, python: str, with_triton: bool) -> dict[str, object]:
    """Create the bundle in the new folder `out`; return the contents of its bundle.json.

    python: the interpreter that compiles Triton's kernels, if with_triton.
    """
    packages = copy_packages(out)
    cache = compile_triton(python, out, arch) if with_triton else None
    libraries = sorted(path.name for path in (out / "qlora_kernels").rglob("*.so"))
    content: dict[str, object] = {"arch": arch, "triton_cache": cache, "packages": packages, "libraries": libraries}
    (out / "bundle.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "run.sh").write_text(RUN, encoding="utf-8")
    return content


def main() -> int:
    """Create the bundle in the folder --out, and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.gpu_bundle", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=capability, default=90, help="compute capability, 90 or 90a for an H100")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-bundle"))
    parser.add_argument(
        "--python", default=sys.executable, help="an interpreter with the machine's Python, torch and Triton"
    )
    parser.add_argument("--no-triton", action="store_true", help="leave Triton's cache out")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists() and not (out / "bundle.json").exists():
        parser.error(f"--out must be a new folder or an older bundle, got {out}; give another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Moved to its place as a whole, so that a failure leaves an older bundle as it is, and no part of a new one.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-") as draft:
        content = write_bundle(
            Path(draft).resolve() / "bundle", arguments.arch, arguments.python, not arguments.no_triton
        )
        if out.exists():
            shutil.rmtree(out)
        shutil.move(Path(draft) / "bundle", out)
    sys.stdout.write(f"{out}: {json.dumps(content)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
