"""qlora-kernels quality: the quantization error of each layer of a model in NF4, as a table, a file and a picture."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Subparsers, UsageError, add_command, add_device, add_quantization, bad_input, positive
from .console import Console
from .tables import table

if TYPE_CHECKING:
    from ..integrations.quantization_report import QuantizationReport


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers,
        "quality",
        run,
        "say what quantization to NF4 costs each layer",
        "Quantize each linear layer of a dense model and report its error, and how often each of the 16 codes occurs "
        "beside how often it would among normally distributed weights.",
    )
    parser.add_argument("--model", required=True, metavar="DIR|GGUF|ID|builtin", help="a dense model")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the whole report here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw errors and codes; needs matplotlib")
    parser.add_argument("--rows", type=positive, default=10, metavar="LAYERS", help="layers of the table, worst first")
    add_quantization(parser)
    add_device(parser, "where layers are quantized", "cpu")


def run(arguments: argparse.Namespace) -> int:
    """Quantize layer by layer and print the report.

    Raises UsageError for a model that is quantized already, and for files that cannot be read or written.
    """
    from ..integrations.model_folders import is_quantized
    from ..integrations.quantization_report import quantization_report
    from ..io.atomic import file_appearing_by_rename
    from .device import chosen_device
    from .model_source import dense_folder

    device = chosen_device(arguments.device, os.environ)
    if arguments.plot is not None:
        import matplotlib  # noqa: F401, its absence is said before any work
    console = Console(quiet=arguments.json)
    with tempfile.TemporaryDirectory() as scratch, bad_input():
        folder = dense_folder(arguments.model, Path(scratch), console)
        if is_quantized(folder):
            raise UsageError(f"--model: must be dense, got {folder}, whose NF4 layers leave nothing to compare with")
        with console.bar(0, "quantizing", "layer") as bar:
            report = quantization_report(
                folder,
                skip=arguments.skip,
                blocksize=arguments.blocksize,
                double_quant=arguments.double_quant,
                device=device,
                on_layers=bar.reset,
                on_layer=bar.update,
            )
    text = json.dumps({**asdict(report), "relative": report.relative, "shares": report.shares})
    with bad_input():
        if arguments.out is not None:
            with file_appearing_by_rename(arguments.out) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
        if arguments.plot is not None:
            from .quality_plot import draw

            with file_appearing_by_rename(arguments.plot) as partial:
                draw(report, partial)
    print(text if arguments.json else _table(report, arguments.rows))
    return 0


def _table(report: QuantizationReport, rows: int) -> str:
    worst = sorted(report.layers, key=lambda layer: -layer.relative)[:rows]
    layers = [
        (each.name, f"{each.relative:.4f}", f"{each.largest:.2e}", f"{each.bits:.3f}", f"{each.divergence:.5f}")
        for each in worst
    ]
    shares = zip(report.shares, report.normal, strict=True)
    return "\n".join(
        [
            f"{len(report.layers)} layers, blocks of {report.blocksize}: relative error {report.relative:.4f} "
            "(root mean square, over that of the weights)",
            "",
            table(layers, ("worst layers", "relative", "largest", "bits", "bits from normal"), right=(1, 2, 3, 4)),
            "",
            table(
                [(str(i), f"{p:.4%}", f"{q:.4%}") for i, (p, q) in enumerate(shares)],
                ("code", "all layers", "normal weights"),
                right=(0, 1, 2),
            ),
        ]
    )
