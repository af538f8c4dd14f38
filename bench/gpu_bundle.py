"""Makes a folder with everything that `make gpu-check` needs on a machine without network and pip.

    python -m bench.gpu_bundle --arch 90 --out out/gpu-bundle        then, there: sh run.sh RESULTS

It contains the package with its compiled libraries, bench/, and the installed packages safetensors and bitsandbytes,
whose binaries run under every Python 3. Triton's kernels are compiled for the GPU into triton-cache, which is used if
the machine has the same version of Triton; otherwise Triton compiles them again. bundle.json lists the contents.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = ("qlora_kernels", "bench")
INSTALLED = ("safetensors", "bitsandbytes")
OTHER_LIBRARIES = ("cuda11", "cuda12", "rocm", "xpu", "hpu")
"""bitsandbytes' libraries for other versions of CUDA and other devices, which are left out."""

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


def compile_triton(out: Path, arch: int) -> str | None:
    """Compile the check's kernels into the bundle's cache; return Triton's version, or None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    variables = os.environ | {"TRITON_CACHE_DIR": str(out / "triton-cache")}
    subprocess.run([sys.executable, "-m", "bench.gpu_check.warm_cache", str(arch)], cwd=ROOT, env=variables, check=True)
    import triton

    version: str = triton.__version__
    return version


def main() -> int:
    """Create the bundle in the folder --out, and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.gpu_bundle", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=capability, default=90, help="compute capability, 90 or 90a for an H100")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-bundle"))
    parser.add_argument("--no-triton", action="store_true", help="leave Triton's cache out")
    arguments = parser.parse_args()
    if arguments.out.exists():
        if not (arguments.out / "bundle.json").exists():
            parser.error(f"--out must be a new folder or an older bundle, got {arguments.out}; give another one")
        shutil.rmtree(arguments.out)
    arguments.out.mkdir(parents=True)
    packages = copy_packages(arguments.out)
    version = None if arguments.no_triton else compile_triton(arguments.out, arguments.arch)
    libraries = sorted(path.name for path in (arguments.out / "qlora_kernels").rglob("*.so"))
    content = {"arch": arguments.arch, "triton": version, "packages": packages, "libraries": libraries}
    (arguments.out / "bundle.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "run.sh").write_text(RUN, encoding="utf-8")
    sys.stdout.write(f"{arguments.out}: {json.dumps(content)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
