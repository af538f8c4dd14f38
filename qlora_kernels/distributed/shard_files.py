"""Hugging Face folders and sharded models: each process reads its own rows; one process writes, tensor by tensor.

The folders have the format of `qlora-kernels quantize` and of bitsandbytes: config.json beside safetensors files, NF4
weights under the names of format/bnb_layout.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..format import bnb_layout
from ..io.atomic import file_appearing_by_rename
from ..io.safetensors_reader import open_safetensors
from ..io.safetensors_writer import SafetensorsWriter
from ..io.streaming import shards_of
from ..nn.linear_nf4 import LinearNF4
from ..nn.module_tree import WRAPPED, layers_of
from ..nn.quantized_weight import QuantizedWeight, is_sharded

_SUFFIX = {"packed": "", "absmax": ".absmax", "absmax_q": ".absmax", "absmax_scale": ".nested_absmax"}
"""Tensor of a LinearNF4 -> suffix after `<layer>.weight` in a file; absmax_offset is a number in the JSON entry."""


@torch.no_grad()
def load_shards(model: nn.Module, folder: str | Path) -> int:
    """Fill the parameters and buffers of `model` from a folder, and return the bytes that this process read.

    model: under make_shardable, sharded or not, with memory (`to_empty`). Adapters keep their values; pass the base
    model of a PeftModel, `model.get_base_model()`, whose names are those of the file. Dense weights are cast.
    A parameter that the file lacks must be tied to one that it has.
    Raises ValueError, naming tensors that are missing, or of another shape, block size or kind of constants.
    """
    files = _Files(Path(folder))
    missing: list[str] = []
    filled: set[int] = set()
    with files:
        for name, module in layers_of(model).items():
            path = _canonical(name)
            if isinstance(module, LinearNF4) and module.in_parameters:
                _load_linear(files, f"{path}.weight", module)
            elif isinstance(module, QuantizedWeight):
                raise NotImplementedError(
                    f"load_shards: {path} must be a LinearNF4 under make_shardable, got {type(module).__name__}"
                )
            for leaf, target in _dense(module):
                key = f"{path}.{leaf}" if path else leaf
                if key in files:
                    files.copy_rows(key, target)
                    filled.add(id(target))
                elif id(target) not in filled:
                    missing.append(key)
    missing = [key for key in missing if id(_leaf(model, key)) not in filled]
    if missing:
        raise ValueError(f"load_shards: {folder} must hold every parameter, got none for {missing[:5]}")
    return files.bytes_read


def save_shards(model: nn.Module, file: str | Path) -> None:
    """Write `model` to one safetensors file with a checkpoint's names. Every process must call this function.

    One tensor at a time is gathered. Rank 0 writes, and the file appears when it is complete. Adapters are left out;
    `save_pretrained` writes them.
    """
    layers = layers_of(model)
    seen: set[int] = set()
    entries: list[tuple[str, Any, str]] = []  # name in the file, owner or tensor, name of a LinearNF4's tensor
    for name, module in layers.items():
        path = _canonical(name)
        if isinstance(module, LinearNF4) and module.in_parameters:
            entries += [(f"{path}.weight{_SUFFIX[t]}", module, t) for t in _SUFFIX if module._stored(t) is not None]
            entries += [(f"{path}.weight.{suffix}", module, suffix) for suffix in _tables(module)]
        for leaf, tensor in _dense(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                entries.append((f"{path}.{leaf}" if path else leaf, tensor, ""))
    writes = not dist.is_initialized() or dist.get_rank() == 0
    with ExitStack() as stack:
        writer = None
        if writes:
            partial = stack.enter_context(file_appearing_by_rename(Path(file)))
            writer = stack.enter_context(SafetensorsWriter(partial, [name for name, _, _ in entries], checksum=True))
        for name, source, tensor_name in entries:
            tensor = _gathered_entry(source, tensor_name)
            if writer is not None:
                writer.write(name, tensor)
    if dist.is_initialized():
        dist.barrier()


def _gathered_entry(source: Any, name: str) -> Tensor:
    if isinstance(source, Tensor):
        return _whole(source)
    layer: LinearNF4 = source
    if name in _SUFFIX:
        return _tensor_of(layer, name)
    offset = _tensor_of(layer, "absmax_offset") if layer.double_quant else None
    return bnb_layout.tables(layer.blocksize, layer.weight_dtype, (layer.out_features, layer.in_features), offset)[name]


def _tables(layer: LinearNF4) -> list[str]:
    return list(
        bnb_layout.tables(layer.blocksize, layer.weight_dtype, (0, 0), torch.zeros(()) if layer.double_quant else None)
    )


def _tensor_of(layer: LinearNF4, name: str) -> Tensor:
    """Return one of the layer's tensors in its checkpoint format, gathered."""
    stored = layer._stored(name)
    assert stored is not None
    whole = layer._from_flat(name, _whole(stored))
    assert whole is not None
    return whole


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _load_linear(files: _Files, key: str, layer: LinearNF4) -> None:
    meta = bnb_layout.read_meta(key, files.whole(f"{key}.{bnb_layout.META_KEY}"))
    wanted = ((layer.out_features, layer.in_features), layer.blocksize, layer.double_quant)
    got = (meta.shape, meta.blocksize, meta.offset is not None)
    if wanted != got:
        raise ValueError(
            f"load_shards: {key} must have the (shape, blocksize, double_quant) of the model, {wanted}, got {got}"
        )
    layer.weight_dtype = meta.dtype
    for name, suffix in _SUFFIX.items():
        target = layer._stored(name)
        if target is not None:
            files.copy_rows(key + suffix, target)
    offset = layer._stored("absmax_offset")
    if offset is not None:
        value = torch.tensor([meta.offset], dtype=torch.float32).view(torch.int32)
        local = _local(offset)
        local.copy_(value[: local.numel()])  # a single element belongs to one process, and the others have none


def _dense(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of the module itself, without those of an NF4 weight."""
    flat = module.flat_parameters() if isinstance(module, QuantizedWeight) else {}
    yield from ((n, p) for n, p in module.named_parameters(recurse=False) if n not in flat)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _leaf(model: nn.Module, key: str) -> Tensor | None:
    for name, module in layers_of(model).items():
        for leaf, tensor in _dense(module):
            if ".".join(filter(None, (_canonical(name), leaf))) == key:
                return tensor
    return None


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", *WRAPPED))


class _Files:
    """The tensors of a folder's safetensors files, with access by rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}

    def __enter__(self) -> _Files:
        for path in shards_of(self.folder):
            file = self._stack.enter_context(open_safetensors(path))
            self._file_of |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def whole(self, key: str) -> Tensor:
        """Return one tensor. Raises ValueError if the files do not have it."""
        if key not in self._file_of:
            raise ValueError(f"load_shards: {self.folder} must hold {key}")
        tensor: Tensor = self._file_of[key].get_tensor(key)
        self.bytes_read += tensor.nbytes
        return tensor

    def copy_rows(self, key: str, target: Any) -> None:
        """Copy this process's rows into `target`; integers are copied by their bits."""
        if key not in self._file_of:
            raise ValueError(f"load_shards: {self.folder} must hold {key}")
        rows = self._file_of[key].get_slice(key)
        shape = tuple(rows.get_shape())
        if shape != tuple(target.shape):
            raise ValueError(f"load_shards: {key} must have shape {tuple(target.shape)}, got {shape}")
        local = _local(target)
        if not local.numel():
            return
        part = rows[_own_range(target)] if shape else self._file_of[key].get_tensor(key)
        self.bytes_read += part.nbytes
        if part.is_floating_point() and not local.is_floating_point():
            if not part.isfinite().all():
                raise ValueError(f"{key} of the checkpoint must be finite, got inf or NaN")
            part = part.view(local.dtype)
        local.copy_(part)


def _own_range(target: Any) -> tuple[slice, ...]:
    if not is_sharded(target):
        return tuple(slice(0, size) for size in target.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
