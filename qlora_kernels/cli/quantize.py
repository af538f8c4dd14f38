"""qlora-kernels quantize SRC DST: writes a model folder in NF4."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Subparsers, UsageError, add_command, add_device, add_quantization, bad_input, dtype_of
from .choices import DTYPES
from .console import Console, megabytes, peak_rss_bytes

if TYPE_CHECKING:
    from ..io.streaming import StreamReport


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers,
        "quantize",
        run,
        "write an NF4 copy of a model folder",
        "Write an NF4 copy of a model folder, reading it tensor by tensor. Both transformers with bitsandbytes and "
        "this package load the result.",
    )
    parser.add_argument("source", metavar="SRC", help="model folder with safetensors, .gguf file, or builtin")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; must not exist")
    add_quantization(parser)
    add_device(parser, "where weights are quantized, to the same bytes", "cpu")
    parser.add_argument(
        "--compute-dtype", choices=DTYPES, default="bf16", help="noted in config.json for those who load the folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Quantize the model, write it and print the sizes.

    Raises UsageError if the target exists, and for a source that is quantized already or cannot be read.
    """
    from ..integrations.model_folders import is_quantized
    from ..io.atomic import folder_appearing_by_rename
    from .device import chosen_device
    from .model_source import dense_folder, quantize_with_bar

    device = chosen_device(arguments.device, os.environ)
    console = Console(quiet=arguments.json)
    target: Path = arguments.target
    with bad_input():
        if target.exists():
            raise UsageError(f"DST must not exist, got {target}")
    with tempfile.TemporaryDirectory() as scratch, bad_input():
        dense = dense_folder(arguments.source, Path(scratch), console)
        if is_quantized(dense):
            raise UsageError(f"SRC must be dense, {dense} is in NF4 already")
        with folder_appearing_by_rename(target) as partial:
            report = quantize_with_bar(
                dense,
                partial,
                console,
                skip=arguments.skip,
                blocksize=arguments.blocksize,
                double_quant=arguments.double_quant,
                compute_dtype=dtype_of(arguments.compute_dtype),
                device=device,
            )
    _print(report, target, console, as_json=arguments.json)
    return 0


def _print(report: StreamReport, target: Path, console: Console, *, as_json: bool) -> None:
    if as_json:
        result = {
            "target": str(target),
            "layers": len(report.quantized),
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "tensors_kept": len(report.kept),
            "peak_rss_bytes": peak_rss_bytes(),
            "seconds": console.seconds,
        }
        print(json.dumps(result))
        return
    ratio = report.bytes_before / report.bytes_after
    print(
        f"{target}: {len(report.quantized)} linear layers, {megabytes(report.bytes_before)} -> "
        f"{megabytes(report.bytes_after)} ({ratio:.2f}x); {len(report.kept)} other tensors as they were; "
        f"{console.seconds:.1f} s, peak memory {megabytes(peak_rss_bytes())}"
    )
