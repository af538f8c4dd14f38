"""Checks that the bindings compile against the headers of the installed torch; 2.10 is the oldest supported version.

    python -m python.build_support.check_headers       prints the compiler's errors, exit code 1 if there are any

The rest of csrc does not use torch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from .cpu import CpuLibrary
from .cuda import CudaLibrary
from .native import CannotBuild


def main() -> int:
    """Check the headers and return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        return int(_any_fails(Path(folder)))


def _any_fails(folder: Path) -> bool:
    failed = False
    for library in (CpuLibrary(), CudaLibrary()):
        try:
            steps = library.compile_steps(folder)
        except CannotBuild as reason:
            print(f"{library.name}: not checked; {reason}")
            continue
        for step in steps:
            source = step.inputs[0]
            if source.parent.name == "bindings":
                step.output.parent.mkdir(parents=True, exist_ok=True)  # for the list of the included headers
                command = [argument for argument in step.command if argument not in ("-c", "-o", str(step.output))]
                done = subprocess.run([*command, "-fsyntax-only"], capture_output=True, text=True, check=False)
                failed |= done.returncode != 0
                print(f"{source.name}: {'compiles' if done.returncode == 0 else done.stderr}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
