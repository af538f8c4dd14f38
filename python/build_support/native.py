"""Compilation of the native libraries by compiler commands that run in parallel and only if their inputs changed.

A library (cpu.py, cuda.py) lists the commands that build it. If a library cannot be built, the package is installed
without it, with one warning, unless the library was requested; its ops then run on the reference backend.
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
"""Set to 1 to install only the Python package."""


class CannotBuild(Exception):
    """The library cannot be built; the message names what is missing, and the fix."""


@dataclass(frozen=True)
class Step:
    """One command that makes `output`; it runs again if an input is newer.

    dependency_file: the file in which the compiler lists the headers it read, as a rule of make (-MD -MF); they are
    inputs.
    """

    command: tuple[str, ...]
    output: Path
    inputs: tuple[Path, ...]
    dependency_file: Path | None = None

    def is_current(self) -> bool:
        """Whether the output was made by this command and is newer than all of its inputs."""
        if not self.output.exists():
            return False
        # The command is an input too, because other flags make another object.
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
    """Return the step that compiles `source` to the object `output`.   command: the compiler and its flags."""
    dependency_file = output.with_suffix(".d")
    record = ("-MD", "-MF", str(dependency_file))
    return Step((*command, *record, "-c", str(source), "-o", str(output)), output, (source,), dependency_file)


class Library(Protocol):
    """A shared library of the package. required: a failure to build it is a failure of the installation."""

    name: str

    @property
    def required(self) -> bool:
        """Whether a failure to build the library is an error."""

    def compile_steps(self, build: Path) -> Sequence[Step]:
        """Return one step for each object file."""

    def link_step(self, objects: Sequence[Path], output: Path) -> Step:
        """Return the step that links the objects into the library."""


def extension(library: Library) -> Extension:
    """Return the library as a setuptools Extension: its name, and that the file works with every Python."""
    made = Extension(library.name, sources=[], py_limited_api=True, optional=True)
    made.library = library
    return made


class BuildNative(build_ext):
    """build_ext that runs the libraries' own commands."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one library if its sources have changed."""
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
            # Linked in the build folder and copied, so that the package contains only the library.
            linked = build / output.name
            library.link_step([step.output for step in steps], linked).run()
            output.parent.mkdir(parents=True, exist_ok=True)
            replace(output, linked)
        except CannotBuild as reason:
            output.unlink(missing_ok=True)  # otherwise an older library would be used
            if library.required:
                raise
            self.warn(f"{library.name} is not built; its ops will run on the reference backend. {reason}")


def replace(library: Path, linked: Path) -> None:
    """Put a copy of `linked` in place of `library` by renaming it.

    Processes that have loaded the library keep the former file; they would crash if its content changed.
    """
    copy = library.with_name(f".{library.name}.{os.getpid()}")
    try:
        shutil.copy2(linked, copy)
        os.replace(copy, library)
    finally:
        copy.unlink(missing_ok=True)


def tool(variable: str, *names: str) -> str:
    """Return the compiler named by the variable `variable`, or the first of `names` on the path."""
    chosen = os.environ.get(variable)
    for name in (chosen,) if chosen else names:
        if found := shutil.which(name):
            return found
    raise CannotBuild(f"No compiler: {chosen or ' or '.join(names)} not found; install one, or name it in {variable}.")


def torch_paths() -> tuple[tuple[Path, ...], Path]:
    """Return (include folders, library folder) of the installed torch."""
    try:
        import torch
    except ImportError as error:
        raise CannotBuild("torch cannot be imported; install it first and build with --no-build-isolation.") from error
    root = Path(torch.__file__).parent
    return (root / "include", root / "include" / "torch" / "csrc" / "api" / "include"), root / "lib"


def headers() -> tuple[Path, ...]:
    """Return all headers of csrc, because each of them may be included by every source."""
    return tuple(sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh")))


TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020A000000000000"
"""The stable ABI of torch 2.10, with which the library loads into that and every later torch."""
