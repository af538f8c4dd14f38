"""Safetensors files, read as a whole and checked; errors name the damaged file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checksum import KEY, Checksum


class DamagedFileError(ValueError):
    """A file was cut short, or its bytes are not those that were saved."""


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a file by safetensors.safe_open; its errors become DamagedFileError with the path.

    Raises DamagedFileError for a file that is cut short, damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DamagedFileError(
            f"{path}: must be a whole safetensors file, got one that is cut short or damaged ({error}); "
            "restore it from a copy"
        ) from error


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its address is no multiple of its element size, which files do not ensure."""
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def read_safetensors(path: str | os.PathLike[str], *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a file, memory-mapped, after a check of its checksum, if it has one.

    check: False skips the checksum, for which the whole file is read.
    Raises FileNotFoundError or DamagedFileError, naming the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a file, there is none")
    with open_safetensors(path) as file:
        metadata: dict[str, str] = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    if check and KEY in metadata:
        checksum = Checksum()
        checksum.add_all(tensors)
        if checksum.hexdigest(metadata) != metadata[KEY]:
            raise DamagedFileError(
                f"{path}: must hold the bytes that were saved, but its checksum does not match; restore it "
                f"from a copy, or write it again without the metadata entry {KEY!r} if the change was meant"
            )
    return tensors, metadata
