"""Our kernels at two commits: `python -m bench.compare REF [--only REGEX] [--rounds N]`.

REF is checked out and built in a temporary worktree. Both trees run their own bench.run alternately, so that other load
on the machine affects both. The peers, which did not change, run in both trees too; their ratio shows the part of a
difference that is caused by the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .machine import ROOT
from .markdown import table
from .row_file import Row

Key = tuple[str, str, str]
"""(op, case, mode)."""

Times = dict[Key, dict[str, list[float]]]
"""Measurement -> contender -> median microseconds of each round."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both trees and print the table."""
    options = _parser().parse_args(arguments)
    with worktree(options.ref) as there:
        print(f"building {options.ref} in {there}", file=sys.stderr, flush=True)
        build(there)
        trees = {options.ref: there, "here": ROOT}
        times: dict[str, Times] = {name: {} for name in trees}
        for number in range(options.rounds):
            for name, tree in in_turn(trees, number):
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                collect(measure(tree, options.only, options.seconds), times[name])
    print(show(options.ref, times[options.ref], times["here"]))
    return 0


@contextlib.contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """Yield a worktree of the repository at `ref`, in a temporary folder that is removed at the end.

    Raises SystemExit if `ref` does not exist.
    """
    with tempfile.TemporaryDirectory(prefix="qlora-compare-") as folder:
        there = Path(folder) / "tree"
        command = ["git", "worktree", "add", "--quiet", "--detach", str(there), ref]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(
                f"bench compare: REF must be a commit of this repository, got {ref!r}: {done.stderr.strip()}"
            )
        try:
            yield there
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(there)], cwd=ROOT, check=False)


def build(tree: Path) -> None:
    """Compile the CPU library of a tree in place."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, stdout=sys.stderr, env={**os.environ, "QLORA_CUDA_ARCHS": ""})


def in_turn(trees: Mapping[str, Path], number: int) -> list[tuple[str, Path]]:
    """Return the trees in the order of round `number`: each is first in every second round."""
    order = list(trees.items())
    return order if number % 2 == 0 else order[::-1]


def measure(tree: Path, only: str, seconds: float) -> list[Row]:
    """Return the rows of one run of a tree's own benchmarks over its own package.

    Raises SystemExit if no case matches `only`.
    """
    command = [sys.executable, "-W", "ignore", "-m", "bench.run", "cpu", "--json", "--only", only]
    done = subprocess.run(
        [*command, "--seconds", str(seconds)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},  # before an editable install of the other tree
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if not any("median_us" in row for row in rows):
        raise SystemExit(f"bench compare: --only must match a case in {tree}, got no rows for {only!r}")
    return rows


def collect(rows: Sequence[Row], times: Times) -> None:
    """Add the times of one run."""
    for row in rows:
        if "median_us" in row:
            of = times.setdefault((row["op"], row["case"], row["mode"]), {})
            of.setdefault(row["contender"], []).append(row["median_us"])


def show(ref: str, there: Times, here: Times) -> str:
    """Print a line for each measurement of both trees: our times, their ratio, and the peers' ratio."""
    lines = []
    for key in (key for key in here if key in there and "ours" in here[key] and "ours" in there[key]):
        before, after = (statistics.median(of[key]["ours"]) for of in (there, here))
        peers = [
            statistics.median(there[key][name]) / statistics.median(here[key][name])
            for name in here[key]
            if not name.startswith("ours") and name in there[key]
        ]
        op, case, mode = key
        drift = f"{statistics.median(peers):.2f}x" if peers else ""
        lines.append(
            [f"{op} {case}, {mode}", f"{before / 1e3:.3g}", f"{after / 1e3:.3g}", f"{before / after:.2f}x", drift]
        )
    return table(["case", f"{ref}, ms", "here, ms", f"here over {ref}", "peers, the same"], lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ref", metavar="REF", help="the commit that this checkout is compared with")
    parser.add_argument("--only", default=r"^linear_nf4 ", metavar="REGEX", help='cases whose "op name" it matches')
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tree (default: 3)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for one case and mode in one run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
