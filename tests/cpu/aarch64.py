"""The CPU kernels on AArch64: cross-compiled with a wheel's flags, linked with the bindings, and run under qemu.

    python -m tests.cpu.aarch64 [ISA ...]          exit code 1 if a comparison fails

It needs an AArch64 compiler and qemu's user-mode emulator (Debian: g++-aarch64-linux-gnu, qemu-user). Without them it
prints a message and exits with 0, or with 1 if QLORA_REQUIRE_AARCH64=1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from python.build_support.cpu import ARM, COMMON_FLAGS, CpuLibrary, family_of
from python.build_support.native import ROOT, Step

from .sanitize.build import build_driver

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYMBOLS = "aarch64-linux-gnu-nm"
REQUIRE = "QLORA_REQUIRE_AARCH64"
PACKAGES = "apt-get install g++-aarch64-linux-gnu qemu-user"
ELF_AARCH64 = 183
"""EM_AARCH64 of the ELF specification."""


def machine_of(elf: bytes) -> int:
    """Return the machine number of an ELF file."""
    return int.from_bytes(elf[18:20], "little")


def undefined_symbols(folder: Path) -> list[str]:
    """Return the package's own functions that the library would lack; it is linked without torch."""
    os.environ["CXX"] = COMPILER
    steps = CpuLibrary().compile_steps(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(Step.run, steps))
    library = folder / "_C.abi3.so"
    objects = tuple(step.output for step in steps)
    Step((COMPILER, "-shared", *map(str, objects), "-o", str(library)), library, objects).run()
    listing = [SYMBOLS, "--dynamic", "--undefined-only", "--demangle", library]
    lines = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if "qlora::" in line]


def main(names: list[str]) -> int:
    if missing := [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]:
        sys.stdout.write(f"test-aarch64 is skipped: {' and '.join(missing)} not found; on Debian: {PACKAGES}\n")
        return int(os.environ.get(REQUIRE) == "1")
    if family_of(COMPILER) is not ARM:
        sys.stderr.write(f"{COMPILER} does not generate code for AArch64\n")
        return 1
    folder = ROOT / "build" / "aarch64"
    program = build_driver(COMPILER, folder, COMMON_FLAGS, ("-static",))
    if (machine := machine_of(program.read_bytes())) != ELF_AARCH64:
        sys.stderr.write(f"{program} is for the ELF machine {machine}, not for AArch64 ({ELF_AARCH64})\n")
        return 1
    sys.stdout.write(f"{program.relative_to(ROOT)}: ELF for AArch64, run by {EMULATOR}\n")
    missing_symbols = undefined_symbols(folder)
    sys.stdout.writelines(f"the library lacks {symbol}\n" for symbol in missing_symbols)
    failed = bool(missing_symbols)
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(run, ([EMULATOR, str(program), isa] for isa in names or ARM.sets)):
            sys.stdout.write(done.stdout + done.stderr)
            failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
