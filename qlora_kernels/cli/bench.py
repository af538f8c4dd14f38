"""qlora-kernels bench ...: the benchmarks of the source tree."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .arguments import Subparsers, UsageError


def add_parser(subparsers: Subparsers) -> None:
    """Registers the subcommand; all its arguments are bench.run's, --help included."""
    parser = subparsers.add_parser(
        "bench", help="run the source tree's benchmarks (python -m bench.run)", add_help=False
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs bench.run in the source tree's root, in a process of its own: it measures with nothing else loaded."""
    root = Path(__file__).parents[2]
    if not (root / "bench" / "run.py").is_file():
        raise UsageError("the benchmarks are in the source tree, not in the wheel; run this from an editable install")
    rest = arguments.rest[1:] if arguments.rest[:1] == ["--"] else arguments.rest
    # `bench tune` measures the Triton kernels' plans on this machine's GPU instead of comparing contenders.
    module, rest = ("bench.tune", rest[1:]) if rest[:1] == ["tune"] else ("bench.run", rest)
    return subprocess.run([sys.executable, "-m", module, *rest], cwd=root, check=False).returncode
