"""Recipes: YAML files that hold the options of a run, read by --config and written beside the run's report."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import UsageError

_EITHER = ("steps", "epochs")
"""Mutually exclusive options: one on the command line replaces the other one in the recipe."""
_OF_ONE_CALL = {"help", "config", "json", "resume", "overwrite"}
"""Options that do not describe the run, such as --json; written recipes leave them out."""


def with_recipe(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return `argv` of a subcommand with the options of its --config file inserted first, so that those in `argv`
    override them.

    parser: parser of the subcommand. Raises UsageError for a file that is not a recipe.
    """
    finder = argparse.ArgumentParser(add_help=False, exit_on_error=False)  # also accepts --conf, as the parser does
    finder.add_argument("--config", type=Path)
    try:
        path = finder.parse_known_args(list(argv))[0].config
    except argparse.ArgumentError:  # --config without a value; the subcommand's parser reports it
        path = None
    if path is None:
        return list(argv)
    given = {argument.partition("=")[0] for argument in argv}
    replaced = {name for name in _EITHER if any(f"--{other}" in given for other in _EITHER)}
    options = {key: value for key, value in read_recipe(path).items() if _option(key) not in replaced}
    return [*_arguments(path, options, parser), *argv]


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises UsageError for anything else."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Raises for a key that occurs twice; YAML libraries silently use the last one."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if isinstance(key, str) and keys.count(key) > 1:
                    raise UsageError(f"--config: {path}:{node.start_mark.line + 1}: must hold {key!r} once")
            return dict(super().construct_mapping(node, deep))

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config: {path}: must be a YAML file ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--config: {path}: must hold options by name, such as `lr: 0.001`")
    return values


def write_recipe(path: Path, arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write all options of a run, defaults included, so that `--config path` repeats it."""
    import yaml

    values: dict[str, Any] = {}
    for action in parser._actions:
        name = _option(action.option_strings[0])
        value = getattr(arguments, action.dest, None)
        if name in _OF_ONE_CALL or value is None or (name == "steps" and getattr(arguments, "epochs", None)):
            continue
        if name == "no-double-quant":
            name = "double-quant"
        values[name] = _plain(value)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    path.write_text(
        f"# Repeat this run with: qlora-kernels finetune --config {path.name}\n"
        f"# Relative paths are relative to {_in_comment(Path.cwd())}\n{text}",
        encoding="utf-8",
    )


def _in_comment(path: Path) -> str:
    """Return a path as text on one line; names may hold line breaks, and bytes that are not UTF-8."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return os.fspath(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, list):  # the values of --set are pairs
        return dict(value) if value and isinstance(value[0], tuple) else [_plain(item) for item in value]
    return value


def _option(key: str) -> str:
    return key.lstrip("-").replace("_", "-")


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options of a parser by their names without dashes."""
    return {_option(name): a for a in parser._actions for name in a.option_strings if name.startswith("--")}


def _arguments(path: Path, options: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    actions = _actions(parser)
    arguments: list[str] = []
    for key, value in options.items():
        name, wanted = _option(key), value
        if name not in actions and f"no-{name}" in actions and isinstance(value, bool):
            name, wanted = f"no-{name}", not value  # double-quant: false
        if name not in actions or name in ("config", "help"):
            near = difflib.get_close_matches(name, actions, n=3, cutoff=0.4)
            hint = f"; did you mean one of {near}?" if near else f"; {parser.prog} --help lists them"
            raise UsageError(f"--config: {path}: must hold options of {parser.prog}, got {key!r}{hint}")
        arguments += _argument(f"{path}: {key}", name, wanted, actions)
    return arguments


def _argument(place: str, name: str, value: Any, actions: Mapping[str, argparse.Action]) -> list[str]:
    action = actions[name]
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"--config: {place} must be true or false, got {value!r}")
        if not value and f"no-{name}" in actions:
            return [f"--no-{name}"]
        return [f"--{name}"] if value else []
    if name == "set":
        return [f"--set={assignment}" for assignment in _assignments(place, value)]
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return [f"--{name}={','.join(map(str, value))}"]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"--config: {place} must be a number, a string or a list of them, got {value!r}")
    return [f"--{name}={value}"]


def _assignments(place: str, value: Any) -> list[str]:
    import json

    if isinstance(value, dict):
        return [f"{field}={json.dumps(item)}" for field, item in value.items()]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise UsageError(f"--config: {place} must be fields and values, or a list of FIELD=VALUE, got {value!r}")
