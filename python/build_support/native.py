"""How the native libraries are compiled: plain compiler commands, run in parallel, repeated only where inputs changed.

A library (cpu.py, cuda.py) says which commands make it; nothing here knows what they compile. A machine that cannot
build one still gets the package, unless it was asked for: the command warns once and goes on, and the ops run on the
reference backend.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

SKIP_VARIABLE = "QLORA_SKIP_NATIVE"
"""Set to 1: install the Python package alone."""


class CannotBuild(Exception):
    """What is missing, and the fix."""


@dataclass(frozen=True)
class Step:
    """One command that makes `output`; done again where an input is younger.

    dependency_file: where the compiler writes which headers it read, as a rule of make (-MD -MF). They are inputs too.
    """

    command: tuple[str, ...]
    output: Path
    inputs: tuple[Path, ...]
    dependency_file: Path | None = None

    def is_current(self) -> bool:
        """Say whether the output was made by this command and is newer than everything it is made from."""
        if not self.output.exists():
            return False
        # The command is an input too: other flags make another object.
        made_by = self.output.with_suffix(self.output.suffix + ".cmd")
        if not made_by.exists() or made_by.read_text() != " ".join(self.command):
            return False
        built = self.output.stat().st_mtime
        try:
            inputs = [*self.inputs, *self._headers()]
            return all(path.stat().st_mtime <= built for path in inputs)
        except FileNotFoundError:  # a header was removed, or no dependency file was written
            return False

    def _headers(self) -> list[Path]:
        if self.dependency_file is None:
            return []
        _, _, names = self.dependency_file.read_text().replace("\\\n", " ").partition(": ")
        return [Path(name.replace("\\ ", " ")) for name in re.split(r"(?<!\\)\s+", names) if name]

    def run(self) -> None:
        if self.is_current():
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(self.command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotBuild(f"{' '.join(self.command)}\n{done.stdout}{done.stderr}")
        if done.stderr.strip():
            print(done.stderr.strip())
        self.output.with_suffix(self.output.suffix + ".cmd").write_text(" ".join(self.command))


def compile_step(command: Sequence[str], source: Path, output: Path) -> Step:
    """The step that compiles `source` to the object `output`.   command: the compiler and its flags."""
    dependency_file = output.with_suffix(".d")
    record = ("-MD", "-MF", str(dependency_file))
    return Step((*command, *record, "-c", str(source), "-o", str(output)), output, (source,), dependency_file)


class Library(Protocol):
    """One shared library of the package. required: a failure to build it fails the installation."""

    name: str

    @property
    def required(self) -> bool:
        """Say whether the build fails where the library cannot be built."""

    def compile_steps(self, build: Path) -> Sequence[Step]:
        """Return one step for each object file."""

    def link_step(self, objects: Sequence[Path], output: Path) -> Step:
        """Return the step that links the objects into the library."""


def extension(library: Library) -> Extension:
    """What setuptools has to know: a name, and that the file serves every Python."""
    made = Extension(library.name, sources=[], py_limited_api=True, optional=True)
    made.library = library
    return made


class BuildNative(build_ext):
    """build_ext that runs the libraries' own commands."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one library, where its sources have changed."""
        if os.environ.get(SKIP_VARIABLE) == "1":
            return
        library: Library = ext.library
        output = Path(self.get_ext_fullpath(ext.name))
        build = Path(self.build_temp).parent / "native" / library.name
        try:
            steps = list(library.compile_steps(build))
            workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(Step.run, steps))
            # Linked in the build folder and copied, so that the package receives the library and nothing beside it.
            linked = build / output.name
            library.link_step([step.output for step in steps], linked).run()
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(linked, output)
        except CannotBuild as reason:
            output.unlink(missing_ok=True)  # an older build's library would be taken for this one
            if library.required:
                raise
            self.warn(f"{library.name} is not built; its ops will run on the reference backend. {reason}")


def tool(variable: str, *names: str) -> str:
    """The compiler that `variable` names, or the first of `names` on the path."""
    chosen = os.environ.get(variable)
    for name in (chosen,) if chosen else names:
        if found := shutil.which(name):
            return found
    raise CannotBuild(f"No compiler: {chosen or ' or '.join(names)} not found; install one, or name it in {variable}.")


def torch_paths() -> tuple[tuple[Path, ...], Path]:
    """(include folders, library folder) of the torch that is importable here."""
    try:
        import torch
    except ImportError as error:
        raise CannotBuild("torch cannot be imported; install it first and build with --no-build-isolation.") from error
    root = Path(torch.__file__).parent
    return (root / "include", root / "include" / "torch" / "csrc" / "api" / "include"), root / "lib"


def headers() -> tuple[Path, ...]:
    """Every header of csrc: any of them may be included anywhere."""
    return tuple(sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh")))


TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020A000000000000"
"""The stable ABI of torch 2.10: the library loads into that and every later torch."""
