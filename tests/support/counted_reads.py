"""Counts of the bytes that a module reads from safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Slice:
    def __init__(self, rows: Any, reads: list[int]) -> None:
        self.rows, self.reads = rows, reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def __getitem__(self, index: Any) -> Any:
        part = self.rows[index]
        self.reads.append(part.nbytes)
        return part


class _File:
    def __init__(self, file: Any, reads: list[int]) -> None:
        self.file, self.reads = file, reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.file.get_slice(name), self.reads)

    def get_tensor(self, name: str) -> Any:
        tensor = self.file.get_tensor(name)
        self.reads.append(tensor.nbytes)
        return tensor


@contextmanager
def counted_reads(module: Any) -> Iterator[list[int]]:
    """Yield a list that gets the bytes of each read through `module.open_safetensors`."""
    reads: list[int] = []
    original = module.open_safetensors

    @contextmanager
    def counting(path: Any) -> Iterator[_File]:
        with original(path) as file:
            yield _File(file, reads)

    module.open_safetensors = counting
    try:
        yield reads
    finally:
        module.open_safetensors = original
