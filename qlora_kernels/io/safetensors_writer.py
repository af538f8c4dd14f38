"""Writes a safetensors file with one tensor in memory at a time; the library's writer takes all tensors at once.

The layout: u64 header length, JSON header, raw tensors without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .checksum import KEY, Checksum

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
_ENTRY_BYTES = 192
"""Bytes reserved in the header for one tensor's dtype, shape and offsets."""
_SMALL = 1 << 16


class SafetensorsWriter:
    """with SafetensorsWriter(path, names) as file: file.write(name, tensor), once for each of `names`, in any order.

    The header precedes the data but is known only at the end, so its space is computed from `names` and padded with
    blanks, which the format allows. Small tensors of an odd size go last, those of wide elements first, so that every
    tensor is aligned to its element size.
    checksum: add a checksum to the metadata, which `read_safetensors` verifies.
    """

    def __init__(
        self,
        path: Path,
        names: Collection[str],
        metadata: Mapping[str, str] | None = None,
        *,
        checksum: bool = False,
    ) -> None:
        self._metadata = dict(metadata or {"format": "pt"})
        self._checksum = Checksum() if checksum else None
        if checksum:
            self._metadata[KEY] = "0" * 64  # a placeholder; the value is known at the end
        self._header: dict[str, Any] = {"__metadata__": self._metadata}
        self._expected = set(names)
        room = len(json.dumps(self._header)) + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._room = room + -room % _ALIGNMENT
        self._offset = 0
        self._last: dict[str, tuple[torch.dtype, list[int], int]] = {}
        self._last_bytes = bytearray()
        self._file = open(path, "wb")  # noqa: SIM115 (__exit__ closes it)
        self._file.seek(8 + self._room)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of a dtype that safetensors supports, on any device.

        Raises ValueError for a name that was not announced or is written already.
        """
        if name not in self._expected:
            raise ValueError(
                f"SafetensorsWriter: name must be one of the announced names and be written once, got {name!r}"
            )
        self._expected.remove(name)
        if self._checksum is not None:
            self._checksum.add(name, tensor)
        if tensor.nbytes % _ALIGNMENT and tensor.nbytes < _SMALL:
            # The bytes go into one buffer. Small tensors kept alive between large ones fragment the heap, which then
            # grows by about a third of a MB with each layer.
            self._last[name] = (tensor.dtype, list(tensor.shape), tensor.nbytes)
            self._last_bytes += _bytes_of(tensor)
        else:
            self._append(name, tensor.dtype, list(tensor.shape), _bytes_of(tensor))

    def _append(self, name: str, dtype: torch.dtype, shape: list[int], data: memoryview) -> None:
        end = self._offset + data.nbytes
        self._header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [self._offset, end]}
        self._offset = end
        self._file.write(data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is not None:
                return
            if self._expected:
                raise ValueError(
                    f"SafetensorsWriter: every announced tensor must be written, {self._expected} were not"
                )
            last, start = memoryview(self._last_bytes), 0
            parts = []
            for name, (dtype, shape, size) in self._last.items():
                parts.append((name, dtype, shape, last[start : start + size]))
                start += size
            for part in sorted(parts, key=lambda part: -part[1].itemsize):
                self._append(*part)
            if self._checksum is not None:
                self._metadata[KEY] = self._checksum.hexdigest(self._metadata)
            text = json.dumps(self._header).encode()
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the tensor's elements in row-major order, as bytes."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
