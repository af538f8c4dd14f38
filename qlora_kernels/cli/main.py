"""qlora-kernels: the parser of the command line, and the exit codes of errors.

Exit codes: 0; 1 if the work failed; 2, with a line that names the fix, for bad input; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import bench, chat, evaluate, export, finetune_parser, generate, info, merge, plan, quality, quantize
from .arguments import UsageError
from .interrupts import ended_by_sigterm
from .recipes import with_recipe
from .standard_streams import open_standard_streams

_EXTRAS = {
    "transformers": "hf",
    "huggingface_hub": "hf",
    "accelerate": "hf",
    "gguf": "hf",
    "tqdm": "hf",
    "psutil": "hf",
    "yaml": "hf",
    "shtab": "completion",
    "datasets": "data",
    "matplotlib": "plot",
}
"""Optional package -> the extra of this package that installs it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, which may quote a long argument; argparse would print the whole usage before it."""
        message = message if len(message) <= 300 else f"{message[:200]} ... {message[-90:]}"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Print the versions, read from the packages' metadata, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *_arguments: object) -> NoReturn:
        versions = []
        for name in ("qlora_kernels", "torch"):
            try:
                versions.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:  # a source tree on sys.path
                versions.append(f"{name} (not installed)")
        print(f"{', '.join(versions)}, Python {platform.python_version()}")
        parser.exit(0)


class _Completion(argparse.Action):
    """Print shtab's script for shell completion of the command, and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        values: Any,
        _option_string: str | None = None,
    ) -> NoReturn:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.exit(2, f"qlora-kernels: {_install('shtab')}\n")
        if values not in shtab.SUPPORTED_SHELLS:
            shells = ", ".join(shtab.SUPPORTED_SHELLS)
            parser.error(f"argument --print-completion: must be one of {shells}, got {values!r}")
        print(shtab.complete(parser, values))
        parser.exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code."""
    open_standard_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _arguments(argv)
    # Importing torch takes seconds, so no command module imports it before its run; `--help` and errors in arguments do
    # not need it.
    from ..integrations.model_folders import ModelError
    from ..io.safetensors_reader import DamagedFileError

    try:
        with ended_by_sigterm():
            code: int = arguments.run(arguments)
            sys.stdout.flush()  # flushed here, so that a full disk still gives an exit code
    except (UsageError, ModelError, DamagedFileError) as error:
        message = " ".join(str(error).split())
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        message = _install(error.name)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter fails at its end
        return 1
    except (MemoryError, RuntimeError, OSError) as error:
        if not isinstance(error, OSError) and not _is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300] or "no more can be allocated"
        kind = "" if isinstance(error, OSError) else "out of memory: "
        sys.stderr.write(f"qlora-kernels {arguments.command}: {kind}{reason}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    else:
        return code
    sys.stderr.write(f"qlora-kernels {arguments.command}: {message}\n")
    return 2


def _arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line, and for `finetune` the recipe of --config."""
    parser = command_parser()
    if argv[:1] == ["bench"]:
        return parser.parse_args([*argv[:1], "--", *argv[1:]])
    if argv[:1] == ["finetune"]:
        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        try:
            argv = [*argv[:1], *with_recipe(argv[1:], commands.choices["finetune"])]
        except UsageError as error:
            parser.exit(2, f"qlora-kernels finetune: {error}\n")
        except ModuleNotFoundError as error:
            if error.name != "yaml":
                raise
            parser.exit(2, f"qlora-kernels finetune: {_install('yaml')}\n")
    return parser.parse_args(argv)


def _install(package: str) -> str:
    return f"{package} must be installed; run `pip install 'qlora_kernels[{_EXTRAS[package]}]'`"


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is out of memory, including torch's errors for devices and for its CPU allocator."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def command_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line with the parsers of all commands."""
    parser = _Parser(prog="qlora-kernels", description="Quantized LoRA: NF4 models, their adapters and their training.")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        metavar="SHELL",
        help="print a completion script for bash, zsh and others",
    )
    parser.add_argument("--version", action=_Version, help="print the versions of qlora_kernels, torch and Python")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (info, plan, quality, quantize, finetune_parser, evaluate, generate, chat, merge, export, bench):
        command.add_parser(subparsers)
    return parser
