"""Reading of safetensors files by rows: each process reads the elements of its shards and no others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.safetensors_reader import open_safetensors
from ..io.safetensors_writer import DTYPE_NAMES
from ..io.streaming import shards_of
from ..nn.quantized_weight import is_sharded
from ..rounding import cdiv

_ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, and any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class RowsOfFiles:
    """A context in which the tensors of a folder's safetensors files are read by rows.

    names: maps the names in the files to name in the model -> name in the files.
    `bytes_read` counts what this process has read.
    """

    def __init__(self, folder: Path, names: Callable[[Sequence[str]], Mapping[str, str]]) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._names = names
        self._stack = ExitStack()
        self._tensors: dict[str, tuple[Any, str]] = {}

    def __enter__(self) -> RowsOfFiles:
        files: dict[str, Any] = {}
        for path in shards_of(self.folder):
            file = self._stack.enter_context(open_safetensors(path))
            files |= dict.fromkeys(file.keys(), file)
        self._tensors = {name: (files[key], key) for name, key in self._names(list(files)).items()}
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def whole(self, name: str) -> Tensor:
        """Return one tensor. Raises ValueError if the files do not have it."""
        file, key = self._find(name)
        return self._counted(file.get_tensor(key))

    def copy_rows(self, name: str, target: Any) -> None:
        """Copy this process's rows of a dense tensor into `target`, and cast them to its dtype.

        Raises ValueError for a tensor that the files lack, or of another shape.
        """
        file, key = self._find(name)
        rows = file.get_slice(key)
        shape = tuple(rows.get_shape())
        if shape != tuple(target.shape):
            raise ValueError(f"load_shards: {name} must have shape {tuple(target.shape)}, got {shape}")
        local = local_part(target)
        if local.numel():
            part = rows[_own_range(target)] if shape else file.get_tensor(key)
            local.copy_(self._counted(part))

    def copy_bits(self, name: str, target: Any, dtype: str | None = None) -> None:
        """Copy the bits of this process's part of a flat integer tensor, which may have another shape in the file.

        dtype: safetensors' name of the dtype in the file; None for any, as bitsandbytes stores packed indices.
        Raises ValueError for another dtype or number of bytes, and for floats that are not finite.
        """
        file, key = self._find(name)
        stored = file.get_slice(key)
        shape, kind = tuple(stored.get_shape()), stored.get_dtype()
        expected, got = target.numel() * target.element_size(), math.prod(shape) * _ITEM_BYTES.get(kind, 0)
        if expected != got or dtype not in (None, kind) or len(shape) > 2:
            raise ValueError(
                f"load_shards: {name} must hold {expected} bytes, of dtype {dtype or 'U8'}, in one or two dimensions, "
                f"got {got} bytes of {kind} with shape {shape}"
            )
        local = local_part(target)
        if not local.numel():
            return
        start = _own_range(target)[0].start * (local.nbytes // local.shape[0])
        size = _ITEM_BYTES[kind]
        first, last = start // size, cdiv(start + local.nbytes, size)
        pieces = [piece.reshape(-1) for piece in _elements(stored, shape, first, last)] if shape else []
        part = self._counted(torch.cat(pieces) if pieces else file.get_tensor(key).reshape(1))
        if part.is_floating_point() and dtype is not None and not part.isfinite().all():
            raise ValueError(f"{name} of the checkpoint must be finite, got inf or NaN")
        own = part.view(torch.uint8)[start - first * size :][: local.nbytes].clone()
        local.copy_(own.view(local.dtype).view(local.shape))

    def _find(self, name: str) -> tuple[Any, str]:
        if name not in self._tensors:
            raise ValueError(f"load_shards: {self.folder} must hold {name}")
        return self._tensors[name]

    def _counted(self, tensor: Tensor) -> Tensor:
        self.bytes_read += tensor.nbytes
        return tensor


def _elements(stored: Any, shape: tuple[int, ...], first: int, last: int) -> Iterator[Tensor]:
    """Yield elements first .. last - 1, in row-major order, of a slice of shape [n] or [n, width]."""
    width = math.prod(shape[1:])
    while first < last:
        row, column = divmod(first, width)
        if column == 0 and last - first >= width:
            piece = stored[row : row + (last - first) // width]
        else:
            piece = stored[row : row + 1, column : min(width, column + last - first)]
        yield piece
        first += piece.numel()


def _own_range(target: Any) -> tuple[slice, ...]:
    if not is_sharded(target):
        return tuple(slice(0, size) for size in target.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
