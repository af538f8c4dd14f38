"""Runs one wheel with the oldest and the newest versions that it supports, and writes docs/compatibility.md.

    python -m python.build_support.compatibility WHEEL [--environments FOLDER] [--only NAME ...]

For each row, the wheel and its dependencies are installed into a new virtual environment, imported and run
(wheel_smoke.py); then the op tests and a fine-tune of a tiny model run on the CPU. Finally, Triton's kernels are
compiled by each version of Triton. The exit code is 1 if a check fails; its output is in out/compatibility.

--environments: a folder whose environments are kept and reused. Without it, each is deleted after its row.
--only: the rows to run; the page keeps its results of the other rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, field
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement

from .check_wheels import SMOKE
from .compatibility_page import page
from .native import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
OUT = ROOT / "out" / "compatibility"
RECORD = OUT / "outcomes.json"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 14)
CORE = ("torch", "numpy", "safetensors")
EXTRAS = ("hf", "plot")
OF_EXTRAS = ("transformers", "accelerate", "gguf", "tqdm", "psutil", "matplotlib")
TEST_TOOLS = ("pytest", "hypothesis", "setuptools")
SHOWN = ("torch", "numpy", "safetensors", "triton", "transformers", "accelerate", "gguf")
OP_TESTS = ("tests/ops", "-m", "not slow")
FINE_TUNE = (
    "tests/cli/test_finetune.py::test_whole_command",
    "tests/integrations/test_quantizer.py::test_model_quantized_in_place_saves_and_loads_here",
)
TRITON_ARCHS = ("80", "90", "100", "120")
TRITON_BETWEEN = ("3.7.1", "3.8.0")
"""Versions of Triton between the oldest and the newest to try: the one of CI (Makefile), and the one of torch 2.14."""


@dataclass(frozen=True)
class Environment:
    """One row of the page.   venv: the virtual environment; rows with the same Python and torch share one in turn.

    oldest: packages at their lower bounds; pip chooses the newest permitted version of all others.
    """

    name: str
    venv: str
    python: tuple[int, int]
    oldest: tuple[str, ...]


@dataclass
class Outcome:
    """The result of a row.   versions: by package.   checks: name of a check -> "pass" or the failure."""

    name: str
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)


class Failed(Exception):
    """A command failed; the message has its last lines."""


def lower_bounds(wheel: Path) -> dict[str, str]:
    """Return package -> its oldest version, from the wheel's metadata, extras included."""
    with zipfile.ZipFile(wheel) as content:
        name = next(name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(content.read(name).decode())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    return {
        requirement.name: specifier.version
        for requirement in requirements
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }


def interpreter(version: tuple[int, int]) -> str | None:
    """Return a Python of that version, on PATH or from pyenv."""
    name = "python{}.{}".format(*version)
    pyenv = sorted(Path.home().glob(".pyenv/versions/{}.{}.*/bin/python".format(*version)))
    for candidate in (shutil.which(name), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def run(log: str, command: list[str | Path], cwd: Path = ROOT, **environment: str) -> str:
    """Return the command's output, which is also written to out/compatibility/<log>.log. Raises Failed on failure."""
    started = time.perf_counter()
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{log}.log").write_text(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}", encoding="utf-8")
    print(f"  {log}: exit code {done.returncode} after {time.perf_counter() - started:.0f} s", flush=True)
    if done.returncode != 0:
        lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
        raise Failed(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout


def check(outcome: Outcome, name: str, log: str, command: list[str | Path], **where: str | Path) -> None:
    """Record the result of a command, which for pytest is its own count."""
    try:
        output = run(log, command, **where)  # type: ignore[arg-type]
    except Failed as reason:
        outcome.checks[name] = f"fails: {reason}"
        return
    counts = re.findall(r"\d+ (?:passed|skipped)", output.splitlines()[-1] if output else "")
    outcome.checks[name] = ", ".join(counts) or "pass"


def run_environment(
    environment: Environment, wheel: Path, bounds: dict[str, str], folder: Path, checkout: Path
) -> Outcome:
    """Run one row with the tests of `checkout` in the virtual environment `folder`, which is made if needed."""
    outcome, name = Outcome(environment.name), environment.name.replace(" ", "-")
    python = interpreter(environment.python)
    if python is None:
        outcome.checks["wheel alone"] = "not run: no Python {}.{} here".format(*environment.python)
        return outcome
    inside = folder / "bin" / "python"
    pip: list[str | Path] = [inside, "-m", "pip"]
    install = [*pip, "install", "-q", "--upgrade", "--upgrade-strategy", "eager"]
    pins = [f"{package}=={bounds[package]}" for package in environment.oldest]
    core = [pin for pin in pins if pin.startswith(CORE)]
    beyond = [pin for pin in pins if not pin.startswith(("safetensors", "numpy"))]  # extras may need newer ones
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if not folder.exists():
                run(f"{name}-venv", [python, "-m", "venv", folder])
            run(f"{name}-venv", [*pip, "uninstall", "-q", "-y", "qlora_kernels"])
            run(f"{name}-core", [*install, *core, wheel])
            alone = versions(inside)
            check(outcome, "wheel alone", f"{name}-smoke", [inside, "-I", SMOKE], cwd=Path(scratch))
            run(f"{name}-extras", [*install, *beyond, *TEST_TOOLS, f"{wheel}[{','.join(EXTRAS)}]"])
        except Failed as reason:
            outcome.checks["wheel alone"] = f"cannot be installed: {reason}"
            return outcome
        outcome.versions = {**versions(inside), "numpy": alone["numpy"], "safetensors": alone["safetensors"]}
        outcome.python = outcome.versions.pop("python")
        pytest: list[str | Path] = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        headers: list[str | Path] = [inside, "-m", "python.build_support.check_headers"]
        check(outcome, "source", f"{name}-source", headers, cwd=checkout)
        check(outcome, "op tests", f"{name}-ops", [*pytest, *OP_TESTS], cwd=checkout)
        check(outcome, "fine-tune", f"{name}-finetune", [*pytest, *FINE_TUNE], cwd=checkout)
    return outcome


def copy_checkout(folder: Path) -> Path:
    """Copy the tests and their helpers without the package, so that they import the installed one."""
    for part in ("tests", "python", "csrc"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    return folder


def versions(python: Path) -> dict[str, str]:
    """Return the versions of Python and of the packages SHOWN in an environment."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        f"found = {{d.metadata['Name'].lower(): d.version for d in m.distributions()}}\n"
        f"shown = {{n: found[n] for n in {SHOWN!r} if n in found}}\n"
        "print(json.dumps({'python': platform.python_version(), **shown}))"
    )
    listing = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(listing)
    return found


def run_triton(requirement: str) -> Outcome:
    """Compile Triton's kernels with one version of Triton, which precedes the installed one on the path."""
    outcome = Outcome(f"Triton {requirement}")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "triton"
        log = f"triton-{requirement.partition('==')[2] or 'newest'}"
        pip: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            target,
            requirement,
        ]
        report = Path(scratch) / "report"
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "python.kernels_report",
            "--quick",
            "--parts",
            "triton",
            "--out",
            report,
        ]
        path = {"PYTHONPATH": str(target), "TRITON_CACHE_DIR": str(Path(scratch) / "cache")}
        try:
            run(f"{log}-install", list(pip))
            outcome.versions["triton"] = (
                next(target.glob("triton-*.dist-info")).name.split("-")[1].removesuffix(".dist")
            )
            run(log, [*command, "--archs", *TRITON_ARCHS], ROOT, **path)
        except Failed as reason:
            outcome.checks["compiled"] = f"fails: {reason}"
            if not (report / "report.json").exists():
                return outcome
        content = json.loads((report / "report.json").read_text(encoding="utf-8"))
        if content["triton"].partition("+")[0] != outcome.versions["triton"]:
            outcome.checks["compiled"] = f"fails: Triton {content['triton']} was imported"
            return outcome
        for arch in TRITON_ARCHS:
            outcome.checks[f"sm_{arch}"] = str(sum(row["arch"] == int(arch) for row in content["rows"]))
        outcome.checks["gates broken"] = str(len(content["broken"]))
    return outcome


def recorded() -> dict[str, Outcome]:
    """Return the recorded outcomes by row."""
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return {name: Outcome(**fields) for name, fields in kept.items()}


def record(outcome: Outcome) -> None:
    """Add an outcome, or replace the one of the same row."""
    outcomes = {**recorded(), outcome.name: outcome}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(kept) for name, kept in outcomes.items()}, indent=1)
    RECORD.write_text(text + "\n", encoding="utf-8")


def newest_published(package: str) -> str:
    """Return the newest release in the index, regardless of pip's constraints; empty if it is not available."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    match = re.match(r"\S+ \(([\w.+]+)\)", subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return match[1] if match else ""


def rows(bounds: dict[str, str]) -> tuple[Environment, ...]:
    """Return the rows: oldest and newest of each package, and the oldest of one with the newest of the other."""
    newest = max(v for v in ((3, minor) for minor in range(10, NEWEST_PYTHON[1] + 1)) if interpreter(v))
    everything = tuple(name for name in (*CORE, *OF_EXTRAS) if name in bounds)
    return (
        Environment("oldest", "oldest", OLDEST_PYTHON, everything),
        Environment("oldest torch", "oldest", OLDEST_PYTHON, ("torch",)),
        Environment("newest", "newest", newest, ()),
        Environment("oldest transformers", "newest", newest, ("transformers",)),
    )


def triton_requirements(bounds: dict[str, str]) -> tuple[str, ...]:
    """Return the oldest version, those of TRITON_BETWEEN, and the newest."""
    return (f"triton=={bounds['triton']}.0", *(f"triton=={version}" for version in TRITON_BETWEEN), "triton")


def main() -> int:
    """Run the chosen environments, write the page and return the exit code."""
    parser = argparse.ArgumentParser(prog="compatibility", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    bounds = lower_bounds(wheel)
    if not arguments.only:
        RECORD.unlink(missing_ok=True)
    environments = rows(bounds)
    with tempfile.TemporaryDirectory() as scratch:
        checkout = copy_checkout(Path(scratch) / "checkout")  # copied now, so that later edits have no effect
        for i, environment in enumerate(environments):
            if not arguments.only or environment.name in arguments.only:
                print(environment.name, flush=True)
                folder = (arguments.environments or Path(scratch)) / environment.venv
                record(run_environment(environment, wheel, bounds, folder, checkout))
            if environment.venv not in [later.venv for later in environments[i + 1 :]]:
                shutil.rmtree(Path(scratch) / environment.venv, ignore_errors=True)  # several GB with CUDA's libraries
    for requirement in triton_requirements(bounds):
        if not arguments.only or f"Triton {requirement}" in arguments.only:
            print(requirement, flush=True)
            record(run_triton(requirement))
    outcomes = recorded()
    names = [*(row.name for row in environments), *(f"Triton {name}" for name in triton_requirements(bounds))]
    ordered = [outcomes[name] for name in names if name in outcomes]
    missing = [v for v in range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1) if interpreter((3, v)) is None]
    published = {name: newest_published(name) for name in ("torch", "triton", "transformers")}
    PAGE.write_text(page(ordered, missing, published), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    return int(any("fails" in text or "cannot" in text for outcome in ordered for text in outcome.checks.values()))


if __name__ == "__main__":
    sys.exit(main())
