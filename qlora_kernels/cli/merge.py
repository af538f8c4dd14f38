"""qlora-kernels merge: merges an adapter into its base and writes an ordinary 16-bit model folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

from .arguments import Subparsers, UsageError, add_command, bad_input
from .console import Console
from .model_options import add_adapter, add_base


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers,
        "merge",
        run,
        "merge an adapter into its base, in 16 bits",
        "Merge an adapter into its base and write an ordinary model folder. The base is quantized to NF4, as in "
        "training, and the adapter added to the dequantized weights: the function that was trained. With --dense it is "
        "added to the base's own weights instead.",
    )
    add_base(parser)
    add_adapter(parser, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Load the model and the adapter, merge them and write the result.

    Raises UsageError if --out exists, and for a model or adapter that cannot be loaded or merged.
    """
    from ..io.atomic import folder_appearing_by_rename

    console = Console(quiet=arguments.json)
    out: Path = arguments.out
    with bad_input():
        if out.exists():
            raise UsageError(f"--out must not exist, got {out}")
    merged, tokenizer, left = merged_model(arguments, console)
    with bad_input(), folder_appearing_by_rename(out) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    if arguments.json:
        print(json.dumps({"out": str(out), "layers_without_adapter": left, "seconds": console.seconds}))
    else:
        print(f"{out}: merged in {console.seconds:.1f} s")
    return 0


def merged_model(arguments: argparse.Namespace, console: Console) -> tuple[Any, Any, int]:
    """Return the model without quantized layers, its tokenizer, and the number of NF4 layers that had no adapter.

    arguments: those of `load_base`, and --adapter, which is merged if given.
    """
    from .. import LinearNF4
    from .model_source import load_adapter, load_base

    base, tokenizer = load_base(arguments, console)
    merged = cast(Any, base)
    if arguments.adapter is not None:
        merged = cast(Any, load_adapter(base, arguments.adapter).merge_and_unload(target="16bit"))
    left = {name: module for name, module in merged.named_modules() if isinstance(module, LinearNF4)}
    for name, layer in left.items():
        merged.set_submodule(name, layer.to_linear())
    return merged, tokenizer, len(left)
