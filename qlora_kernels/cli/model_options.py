"""The options that name a model and say how it is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_model, add_quantization


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add the options that `model_source.load_base` reads to a parser."""
    add_model(parser)
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder for converted models; without it, none is kept"
    )
    parser.add_argument("--dense", action="store_true", help="do not quantize a dense model")
    add_quantization(parser)
