"""Hugging Face folders and sharded models: each process reads its own rows; one process writes, tensor by tensor.

The folders are those of `qlora-kernels quantize`, of bitsandbytes and of save_pretrained with NF4 layers: config.json
beside safetensors files, weights of LinearNF4 under the names of format/bnb_layout.py, those of ExpertsNF4 under the
names of its buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..format import bnb_layout
from ..io.atomic import file_appearing_by_rename, files_appearing_together
from ..io.safetensors_writer import SafetensorsWriter
from ..nn.describe import file_names_of, write_description
from ..nn.experts_nf4 import ExpertsNF4
from ..nn.linear_nf4 import LinearNF4
from ..nn.module_tree import WRAPPED, layers_of
from ..nn.quantized_weight import TENSORS, QuantizedWeight, is_sharded
from ..peft import PeftModel
from ..peft.core.sharded import write_on_rank_zero
from .own_rows import RowsOfFiles, local_part

_SUFFIX = {"packed": "", "absmax": ".absmax", "absmax_q": ".absmax", "absmax_scale": ".nested_absmax"}
"""Tensor of a LinearNF4 -> suffix after `<layer>.weight` in a file; absmax_offset is a number in the JSON entry."""
_DTYPE = {"packed": None, "absmax_q": "U8"}
"""Tensor of an NF4 weight -> its dtype in a file, where that is not F32; None for any."""
WEIGHTS = "model.safetensors"
_FILES_OF_FOLDER = (WEIGHTS, f"{WEIGHTS}.index.json", "config.json", "generation_config.json")


@torch.no_grad()
def load_shards(model: nn.Module, folder: str | Path) -> int:
    """Fill the parameters and buffers of `model` from a folder, and return the bytes that this process read.

    model: under make_shardable, sharded or not, with memory (`to_empty`). Of a PeftModel, the base model is filled, and
    the adapters keep their values. Dense weights are cast. A parameter that the files lack must be tied to one that
    they have.
    Raises ValueError, naming tensors that are missing, or of another shape, block size or kind of constants;
    RuntimeError for NF4 weights without make_shardable.
    """
    model = _base(model)
    missing: list[str] = []
    filled: set[int] = set()
    files = RowsOfFiles(Path(folder), partial(file_names_of, model, _names(model)))
    with files:
        for name, module in layers_of(model).items():
            path = _canonical(name)
            if isinstance(module, QuantizedWeight):
                if not module.in_parameters:
                    raise RuntimeError(f"load_shards: {path} must be under make_shardable, which was not called")
                if isinstance(module, ExpertsNF4):
                    _load_experts(files, path, module)
                else:
                    _load_linear(files, path, cast(LinearNF4, module))
            for leaf, target in _dense(module):
                key = _joined(path, leaf)
                if key in files:
                    files.copy_rows(key, target)
                    filled.add(id(target))
                elif id(target) not in filled:
                    missing.append(key)
    missing = [key for key in missing if id(_leaf(model, key)) not in filled]
    if missing:
        raise ValueError(
            f"load_shards: {folder} must hold every parameter as one tensor, got none for {missing[:5]}; where "
            "transformers joins several tensors of the files, shard the model of load_model(folder, mapped=True)"
        )
    return files.bytes_read


def save_shards(model: nn.Module, target: str | Path) -> None:
    """Write `model` with a checkpoint's names. Every process must call this function.

    target: a file whose name ends with .safetensors; or a folder, which gets model.safetensors and, for a transformers
    model, its config.json, so that from_pretrained and load_shards read it. Other files of the folder are kept.
    One tensor at a time is gathered. Rank 0 writes, and the files appear when they are complete. Adapters are left out;
    `save_pretrained` of the PeftModel writes them.
    Raises RuntimeError in the other processes if rank 0 cannot write.
    """
    model = _base(model)
    entries = list(_entries(model))
    tensors = (_gathered(entry) for entry in entries)

    def write() -> None:
        try:
            _write(model, Path(target), [entry.name for entry in entries], tensors)
        finally:
            _exhaust(tensors)  # after an error too, because the other processes take part in every gathering

    if not dist.is_initialized():
        write()
        return
    if dist.get_rank() > 0:
        _exhaust(tensors)
    write_on_rank_zero(write, "save_shards")


class _Entry(NamedTuple):
    """A tensor of a file.   name: in the file.   source: the tensor, or the NF4 module that has it under `own_name`."""

    name: str
    source: Any
    own_name: str = ""


def _entries(model: nn.Module) -> Iterator[_Entry]:
    seen: set[int] = set()
    for name, module in layers_of(model).items():
        path = _canonical(name)
        if isinstance(module, ExpertsNF4) and module.in_parameters:
            yield from (_Entry(f"{path}.{t}", module, t) for t in TENSORS if module._stored(t) is not None)
        elif isinstance(module, LinearNF4) and module.in_parameters:
            stored = [t for t in _SUFFIX if module._stored(t) is not None]
            yield from (_Entry(f"{path}.weight{_SUFFIX[t]}", module, t) for t in stored)
            yield from (_Entry(f"{path}.weight.{suffix}", module, suffix) for suffix in _tables(module))
        for leaf, tensor in _dense(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _Entry(_joined(path, leaf), tensor)


def _write(model: nn.Module, target: Path, names: list[str], tensors: Iterator[Tensor]) -> None:
    if target.suffix == ".safetensors":
        with file_appearing_by_rename(target) as partial_file:
            _write_file(partial_file, names, tensors)
        return
    with files_appearing_together(target, _FILES_OF_FOLDER) as folder:
        _write_file(folder / WEIGHTS, names, tensors)
        write_description(model, folder)


def _write_file(path: Path, names: list[str], tensors: Iterator[Tensor]) -> None:
    with SafetensorsWriter(path, names, checksum=True) as writer:
        for name in names:
            writer.write(name, next(tensors))


def _exhaust(tensors: Iterator[Tensor]) -> None:
    for _ in tensors:
        pass


def _gathered(entry: _Entry) -> Tensor:
    source, name = entry.source, entry.own_name
    if isinstance(source, Tensor):
        return _whole(source)
    if isinstance(source, ExpertsNF4) or name in _SUFFIX:
        return _tensor_of(source, name)
    layer: LinearNF4 = source
    offset = _tensor_of(layer, "absmax_offset") if layer.double_quant else None
    return bnb_layout.tables(layer.blocksize, layer.weight_dtype, (layer.out_features, layer.in_features), offset)[name]


def _tables(layer: LinearNF4) -> list[str]:
    return list(
        bnb_layout.tables(layer.blocksize, layer.weight_dtype, (0, 0), torch.zeros(()) if layer.double_quant else None)
    )


def _tensor_of(module: QuantizedWeight, name: str) -> Tensor:
    """Return one of the module's tensors in its checkpoint format, gathered."""
    stored = module._stored(name)
    assert stored is not None
    whole = module._from_flat(name, _whole(stored))
    assert whole is not None
    return whole


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _load_linear(files: RowsOfFiles, path: str, layer: LinearNF4) -> None:
    key = f"{path}.weight"
    meta = bnb_layout.read_meta(key, files.whole(f"{key}.{bnb_layout.META_KEY}"))
    wanted = ((layer.out_features, layer.in_features), layer.blocksize, layer.double_quant)
    got = (meta.shape, meta.blocksize, meta.offset is not None)
    if wanted != got:
        raise ValueError(
            f"load_shards: {key} must have the (shape, blocksize, double_quant) of the model, {wanted}, got {got}"
        )
    bnb_layout.check_tables(
        key, {table: files.whole(f"{key}.{table}") for table in bnb_layout.TABLES if f"{key}.{table}" in files}
    )
    layer.weight_dtype = meta.dtype
    for name, suffix in _SUFFIX.items():
        target = layer._stored(name)
        if target is not None:
            files.copy_bits(key + suffix, target, _DTYPE.get(name, "F32"))
    offset = layer._stored("absmax_offset")
    if offset is not None:
        value = torch.tensor([meta.offset], dtype=torch.float32).view(torch.int32)
        local = local_part(offset)
        local.copy_(value[: local.numel()])  # a single element belongs to one process, and the others have none


def _load_experts(files: RowsOfFiles, path: str, experts: ExpertsNF4) -> None:
    for name in TENSORS:
        target, key = experts._stored(name), f"{path}.{name}"
        if target is not None:
            files.copy_bits(key, target, _DTYPE.get(name, "F32"))
        elif key in files:
            raise ValueError(f"load_shards: {path} must have double_quant={experts.double_quant}, got {key}")


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _names(model: nn.Module) -> list[str]:
    """Return the names of weights and buffers in the model, as its one-process form in NF4 has them."""
    names = []
    for name, module in layers_of(model).items():
        path = _canonical(name)
        names += [_joined(path, leaf) for leaf, _ in _dense(module)]
        if isinstance(module, QuantizedWeight):
            names.append(path if isinstance(module, ExpertsNF4) else f"{path}.weight")
    return names


def _dense(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of the module itself, without those of an NF4 weight."""
    flat = {} if not isinstance(module, QuantizedWeight) else module.flat_parameters() or dict.fromkeys(TENSORS)
    yield from ((n, p) for n, p in module.named_parameters(recurse=False) if n not in flat)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set and name not in flat:
            yield name, buffer


def _leaf(model: nn.Module, key: str) -> Tensor | None:
    for name, module in layers_of(model).items():
        for leaf, tensor in _dense(module):
            if _joined(_canonical(name), leaf) == key:
                return tensor
    return None


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", *WRAPPED))


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
