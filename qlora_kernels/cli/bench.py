"""qlora-kernels bench ...: the benchmarks of the source tree."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .arguments import Subparsers, UsageError

MODULES = {
    "report": "bench.report",
    "compare": "bench.compare",
    "fidelity": "bench.fidelity",
    "tune": "bench.tune",
}
"""First argument -> module that gets the other arguments; the default is bench.run."""


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand; all arguments, --help included, are passed to the bench module."""
    parser = subparsers.add_parser(
        "bench",
        help="run the source tree's benchmarks (python -m bench.run); report, compare REF, fidelity, tune",
        add_help=False,
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run a bench module in the root of the source tree, in a separate process, so that no other modules are loaded.

    Raises UsageError if the package was installed from a wheel, which does not contain the benchmarks.
    """
    root = Path(__file__).parents[2]
    if not (root / "bench" / "run.py").is_file():
        raise UsageError("the benchmarks are in the source tree, not in the wheel; run this from an editable install")
    rest = arguments.rest[1:] if arguments.rest[:1] == ["--"] else arguments.rest
    module, rest = (MODULES[rest[0]], rest[1:]) if rest[:1] and rest[0] in MODULES else ("bench.run", rest)
    return subprocess.run([sys.executable, "-m", module, *rest], cwd=root, check=False).returncode
