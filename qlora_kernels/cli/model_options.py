"""Options of several subcommands: the model, the adapter, and sampling."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_model, add_quantization, positive, seed, temperature


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add the options that `model_source.load_base` reads to a parser."""
    add_model(parser)
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder for converted models; without it, none is kept"
    )
    parser.add_argument("--dense", action="store_true", help="do not quantize a dense model")
    add_quantization(parser)


def add_adapter(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the option that names an adapter folder to a parser."""
    parser.add_argument(
        "--adapter", type=Path, required=required, metavar="DIR", help="adapter folder in PEFT's layout"
    )


def add_sampling(parser: argparse.ArgumentParser, *, tokens: int, tokens_help: str) -> None:
    """Add the options of sampling to a parser.

    tokens: default of --max-new-tokens.   tokens_help: its help text.
    """
    parser.add_argument("--max-new-tokens", type=positive, default=tokens, metavar="TOKENS", help=tokens_help)
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="0: always the most likely token; above: sampling"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of sampling")
