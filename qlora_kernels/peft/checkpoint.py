"""From an adapter to the folder it lies in, and back. A combination of methods is a folder of folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..io import peft_checkpoint
from ..io.peft_checkpoint import AdapterFiles
from .config import PeftConfig
from .method import Method
from .registry import config_from_dict


def save_adapter(methods: Sequence[Method], directory: str | os.PathLike[str]) -> None:
    for method in methods:
        method.before_save()
    if len(methods) == 1:
        _save_method(methods[0], directory)
        return
    parts = [f"{i}_{method.config.peft_type.lower()}" for i, method in enumerate(methods)]
    for part, method in zip(parts, methods, strict=True):
        _save_method(method, Path(directory) / part)
    peft_checkpoint.write_parts(directory, parts)


def _save_method(method: Method, directory: str | os.PathLike[str]) -> None:
    values, tensors = method.extras()
    peft_checkpoint.write_adapter(
        directory,
        AdapterFiles(
            config=method.file_config(),
            tensors=method.tensors(),
            extras={"loads_in_peft": method.loads_in_peft, **values},
            extra_tensors=tensors,
        ),
    )


def _folders(directory: str | os.PathLike[str]) -> list[Path]:
    extras = peft_checkpoint.read_extras(directory) or {}
    return [Path(directory) / part for part in extras.get("parts", ["."])]


def load_configs(directory: str | os.PathLike[str]) -> list[PeftConfig]:
    return [_config(peft_checkpoint.read_adapter(folder)) for folder in _folders(directory)]


def _config(files: AdapterFiles) -> PeftConfig:
    """adapter_config.json, and over it the fields that only our sidecar knows."""
    return config_from_dict({**files.config, **(files.extras or {}).get("config", {})})


def load_weights(methods: Sequence[Method], directory: str | os.PathLike[str], *, is_trainable: bool) -> None:
    for method, folder in zip(methods, _folders(directory), strict=True):
        files = peft_checkpoint.read_adapter(folder)
        method.load_tensors(files.tensors)
        if files.extras is not None:
            method.load_extras(files.extras, files.extra_tensors, is_trainable=is_trainable)
