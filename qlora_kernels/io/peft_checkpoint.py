"""Adapter folders in PEFT's layout: adapter_config.json + adapter_model.safetensors, written by rename, never pickled.

What PEFT has no place for (the encoder that a P-tuning run needs to resume, ...) lies beside them in
qlora_kernels.json and qlora_kernels.safetensors, which PEFT does not look at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .atomic import file_appearing_by_rename, file_vanishing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXTRA_CONFIG, EXTRA_WEIGHTS = "qlora_kernels.json", "qlora_kernels.safetensors"


@dataclass
class AdapterFiles:
    """The contents of one adapter folder.   `extras` is None where no sidecar exists: a file that PEFT wrote."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    extras: dict[str, Any] | None = None
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)


def write_adapter(directory: str | os.PathLike[str], files: AdapterFiles) -> None:
    """Writes the folder, made if it is not there; of an adapter that it held before nothing stays behind.

    All is written beside the old files before the first of them is touched: where writing raises, they are whole.
    """
    folder = Path(directory)
    # Exits run backwards: the sidecar's files take their places first, the configuration last.
    with ExitStack() as stack:
        _put_json(stack, folder / CONFIG, files.config)
        _put_tensors(stack, folder / WEIGHTS, files.tensors)
        _put_json(stack, folder / EXTRA_CONFIG, files.extras)
        _put_tensors(stack, folder / EXTRA_WEIGHTS, files.extra_tensors or None)


def write_parts(directory: str | os.PathLike[str], parts: Sequence[str]) -> None:
    """Makes the folder one of several adapters, which lie in its subfolders `parts`, and none itself."""
    folder = Path(directory)
    with ExitStack() as stack:
        for name in (CONFIG, WEIGHTS, EXTRA_WEIGHTS):
            stack.enter_context(file_vanishing(folder / name))
        _put_json(stack, folder / EXTRA_CONFIG, {"parts": list(parts)})


def read_adapter(directory: str | os.PathLike[str]) -> AdapterFiles:
    """Raises FileNotFoundError that says which of the two files the folder lacks."""
    folder = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = (
                " (adapter_model.bin is a pickle, which is not read)" if (folder / "adapter_model.bin").exists() else ""
            )
            raise FileNotFoundError(f"{folder}: {name} must exist{pickled}")
    return AdapterFiles(
        config=json.loads((folder / CONFIG).read_text()),
        tensors=load_file(folder / WEIGHTS),
        extras=read_extras(folder),
        extra_tensors=load_file(folder / EXTRA_WEIGHTS) if (folder / EXTRA_WEIGHTS).is_file() else {},
    )


def read_extras(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    path = Path(directory) / EXTRA_CONFIG
    return json.loads(path.read_text()) if path.is_file() else None


def _put_json(stack: ExitStack, path: Path, values: dict[str, Any] | None) -> None:
    if values is None:
        stack.enter_context(file_vanishing(path))
    else:
        partial = stack.enter_context(file_appearing_by_rename(path))
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _put_tensors(stack: ExitStack, path: Path, tensors: dict[str, Tensor] | None) -> None:
    if tensors is None:
        stack.enter_context(file_vanishing(path))
        return
    partial = stack.enter_context(file_appearing_by_rename(path))
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(contiguous, partial, metadata={"format": "pt"})
