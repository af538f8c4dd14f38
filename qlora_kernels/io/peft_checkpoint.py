"""Adapter folders in PEFT's layout: adapter_config.json + adapter_model.safetensors, written by rename, never pickled.

What PEFT has no place for (the encoder that a P-tuning run needs to resume, ...) lies beside them in
qlora_kernels.json and qlora_kernels.safetensors, which PEFT does not look at.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

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
    """Writes the folder, made if it is not there. Each file appears complete; the configuration last."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if files.extra_tensors:
        _replace(folder / EXTRA_WEIGHTS, lambda path: _save_tensors(files.extra_tensors, path))
    if files.extras is not None:
        write_json(folder / EXTRA_CONFIG, files.extras)
    _replace(folder / WEIGHTS, lambda path: _save_tensors(files.tensors, path))
    write_json(folder / CONFIG, files.config)


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


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda temporary: temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n"))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"}
    )


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
