"""Adapter folders in PEFT's layout: adapter_config.json + adapter_model.safetensors, never pickled.

Data that PEFT's layout does not cover, such as the encoder that a P-tuning run needs to resume, is stored beside these
files in qlora_kernels.json and qlora_kernels.safetensors, which PEFT ignores. A save publishes all files of all folders
at once (atomic.py). The tensor files carry checksums. qlora_kernels.json holds the checksum of adapter_config.json, so
that a changed configuration, which is allowed, gives a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .atomic import files_appearing_together, reading
from .json_file import json_object, read_json_object
from .safetensors_reader import read_safetensors
from .safetensors_writer import SafetensorsWriter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXTRA_CONFIG, EXTRA_WEIGHTS = "qlora_kernels.json", "qlora_kernels.safetensors"
_PARTS, _CONFIG_CHECKSUM = "parts", "config_sha256"


@dataclass
class AdapterFiles:
    """The contents of one adapter folder.   `extras` is None if there is no sidecar, as in folders written by PEFT."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    extras: dict[str, Any] | None = None
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)


def write_adapters(directory: str | os.PathLike[str], folders: Mapping[str, AdapterFiles | Sequence[str]]) -> None:
    """Write adapter folders, made if needed, as one change: either all of them are new afterwards, or none is.

    folders: path relative to `directory` ("." for itself) -> an adapter or, for a folder that represents a combination,
    the names of its subfolders with the parts. Files of an adapter that a folder held before are removed.
    """
    names = [str(Path(folder, name)) for folder in folders for name in (CONFIG, WEIGHTS, EXTRA_CONFIG, EXTRA_WEIGHTS)]
    with files_appearing_together(Path(directory), names) as partial:
        for folder, contents in folders.items():
            (partial / folder).mkdir(parents=True, exist_ok=True)
            if isinstance(contents, AdapterFiles):
                _write(partial / folder, contents)
            else:
                _write_json(partial / folder / EXTRA_CONFIG, {_PARTS: list(contents)})


def read_adapters(directory: str | os.PathLike[str]) -> list[AdapterFiles]:
    """Read the adapter in a folder, or the parts of the combination that the folder represents.

    Raises FileNotFoundError, naming a missing file; ValueError, naming a damaged file or a tensor with inf or NaN.
    """
    folder = Path(directory)
    with reading(folder):
        extras = _read_extras(folder) or {}
        parts = extras.get(_PARTS)
        if parts is None:
            return [_read(folder)]
        if not (isinstance(parts, list) and parts and all(isinstance(p, str) and p == Path(p).name for p in parts)):
            raise ValueError(f"{folder / EXTRA_CONFIG}: {_PARTS} must be a list of names of subfolders, got {parts!r}")
        return [_read(folder / part) for part in parts]


def _write(folder: Path, files: AdapterFiles) -> None:
    _write_json(folder / CONFIG, files.config)
    save_file(files.tensors, folder / WEIGHTS)
    if files.extras is not None:
        checksum = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
        _write_json(folder / EXTRA_CONFIG, {**files.extras, _CONFIG_CHECKSUM: checksum})
    if files.extra_tensors:
        save_file(files.extra_tensors, folder / EXTRA_WEIGHTS)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write as safetensors' function of this name does, but with metadata in a fixed order."""
    with SafetensorsWriter(path, sorted(tensors), checksum=True) as writer:
        for name in sorted(tensors):
            writer.write(name, tensors[name])


def _read(folder: Path) -> AdapterFiles:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = (
                " (adapter_model.bin is a pickle, which is not read)" if (folder / "adapter_model.bin").exists() else ""
            )
            raise FileNotFoundError(f"{folder}: {name} must exist{pickled}")
    text = (folder / CONFIG).read_bytes()
    extras = _read_extras(folder)
    saved = (extras or {}).pop(_CONFIG_CHECKSUM, None)
    if saved not in (None, hashlib.sha256(text).hexdigest()):
        warnings.warn(
            f"{folder / CONFIG} differs from the file that was saved: it was edited or damaged. It is used as it is.",
            stacklevel=4,
        )
    extra_tensors = _read_tensors(folder / EXTRA_WEIGHTS) if (folder / EXTRA_WEIGHTS).is_file() else {}
    return AdapterFiles(
        config=json_object(text, str(folder / CONFIG)),
        tensors=_read_tensors(folder / WEIGHTS),
        extras=extras,
        extra_tensors=extra_tensors,
    )


def _read_extras(folder: Path) -> dict[str, Any] | None:
    path = folder / EXTRA_CONFIG
    return read_json_object(path) if path.is_file() else None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors, _ = read_safetensors(path)
    for name, tensor in tensors.items():
        # isfinite does not support 8-bit floats.
        if tensor.is_floating_point() and not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():
            raise ValueError(f"{path}: {name} must be finite, got inf or NaN")
    return tensors
