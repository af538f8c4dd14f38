"""The command line: one file per subcommand, each with add_parser(subparsers) and run(arguments)."""

from .main import main

__all__ = ["main"]
