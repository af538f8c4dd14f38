"""Quantizes a Hugging Face safetensors folder to NF4 while reading it, tensor by tensor.

The result has bitsandbytes' keys and a quantization_config in its config.json. transformers loads it with bitsandbytes,
and integrations.transformers.load_model loads it without.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..format import bnb_layout
from ..format.nf4 import DEFAULT_BLOCKSIZE
from ..ops.quantize_nf4 import quantize_nf4
from .json_file import MOST_BYTES, read_json_object
from .model_cache import MANIFEST
from .safetensors_reader import open_safetensors, read_safetensors
from .safetensors_writer import SafetensorsWriter

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F32", "BF16", "F16"}


@dataclass(frozen=True)
class StreamReport:
    """Which tensors of a folder were quantized, and their bytes.

    quantized: layer -> (bytes before, bytes after).   kept: names of tensors that were copied unchanged.
    """

    quantized: dict[str, tuple[int, int]]
    kept: tuple[str, ...]

    @property
    def bytes_before(self) -> int:
        """Return the bytes of the quantized weights in the source."""
        return sum(before for before, _ in self.quantized.values())

    @property
    def bytes_after(self) -> int:
        """Return the bytes of the packed indices and constants that replace them."""
        return sum(after for _, after in self.quantized.values())


def quantize_folder(
    source: Path,
    target: Path,
    layers: Collection[str],
    *,
    blocksize: int = DEFAULT_BLOCKSIZE,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    on_tensor: Callable[[str], object] = lambda name: None,
    parameter_of: Callable[[str], str | None] = lambda name: name,
    transposed: Collection[str] = (),
    device: torch.device | str | None = None,
) -> StreamReport:
    """Fill the empty folder `target` from `source`, with the weights of `layers` in NF4 and everything else unchanged.

    source: config.json and model.safetensors, or shards with model.safetensors.index.json; the target has one file for
    each of these. Other files are copied, except other formats of the same weights.
    layers: names of linear layers.   compute_dtype: recorded in config.json for programs that load the folder.
    on_tensor: called with each name in the files after it was processed.   Peak memory is about that of the largest
    tensor.
    parameter_of: maps a name in the files to the name of the model's parameter, or None if it is only part of one.
    transposed: those of `layers` whose weight is stored as [in_features, out_features].
    device: where the weights are quantized, one after the other; the bytes are the same on every device.
    Raises ValueError if the source is already quantized, lacks a file, or has no tensor of `layers`.
    """
    config = read_json_object(source / CONFIG)
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"quantize_folder: {source} must hold 16- or 32-bit weights, got quantization {method!r}")
    shards = shards_of(source)
    quantized: dict[str, tuple[int, int]] = {}
    kept: list[str] = []
    dense: list[str] = []
    weight_map: dict[str, str] = {}
    for shard in shards:
        with open_safetensors(shard) as file:
            names = list(file.keys())
            layer_of = {name: _layer_of(parameter_of(name) or "") for name in names}
            chosen = {n for n in names if layer_of[n] in layers and file.get_slice(n).get_dtype() in _FLOATS}
            written = [out for n in names for out in (_quantized_names(n, double_quant) if n in chosen else [n])]
            weight_map |= dict.fromkeys(written, shard.name)
            with SafetensorsWriter(target / shard.name, written, checksum=True) as writer:
                for name in names:
                    tensor = file.get_tensor(name)
                    if name in chosen:
                        layer = layer_of[name]
                        tensor = tensor.to(device)
                        weight = tensor.T.contiguous() if layer in transposed else tensor
                        quantized[layer] = _write_quantized(writer, name, weight, blocksize, double_quant)
                    else:
                        kept.append(name)
                        dense.append(layer_of[name])
                        writer.write(name, tensor)
                    on_tensor(name)
    if not quantized:
        raise ValueError(f"quantize_folder: {source} must hold the weight of at least one of {len(layers)} layers")
    if "lm_head" not in quantized:  # a tied head has no tensor of its own
        dense.append("lm_head")
    config["quantization_config"] = bnb_layout.quantization_config(double_quant, compute_dtype, dense)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(shards) > 1:
        total = sum((target / shard.name).stat().st_size for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _copy_other_files(source, target)
    return StreamReport(quantized, tuple(kept))


def shards_of(folder: Path) -> list[Path]:
    """Return the safetensors files of the model in `folder`. Raises ValueError if there are none."""
    if (folder / _INDEX).is_file():
        index = read_json_object(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(n, str) and n == Path(n).name for n in index.values()):
            raise ValueError(f"{folder / _INDEX}: weight_map must map names of tensors to files of the folder")
        names = sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: must hold every file that {_INDEX} names, {missing[0]} is missing")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ValueError(f"{folder}: must hold model.safetensors or {_INDEX}; pickled weights are not read")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the model's tensors, read from the files' headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards_of(folder):
        with open_safetensors(shard) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def folder_fingerprint(folder: Path) -> str:
    """Return a hash, 16 hex digits, of config.json and the headers of the weight files, which include checksums."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for shard in shards_of(folder):
        with open(shard, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            digest.update(shard.name.encode() + file.read(min(size, MOST_BYTES)))
    return digest.hexdigest()[:16]


def read_tensors(folder: Path, process: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    """Return all of the model's tensors, memory-mapped, after a check of the files' checksums if they have any.

    process: (rank, world) of a process, of which each checks every world-th file.
    """
    rank, world = process
    tensors: dict[str, Tensor] = {}
    for number, shard in enumerate(shards_of(folder)):
        tensors |= read_safetensors(shard, check=number % world == rank)[0]
    return tensors


def _layer_of(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def _quantized_names(name: str, double_quant: bool) -> list[str]:
    nested = ("nested_absmax", "nested_quant_map")
    return [name, *(f"{name}.{suffix}" for suffix in bnb_layout.SUFFIXES if double_quant or suffix not in nested)]


def _write_quantized(
    writer: SafetensorsWriter, name: str, weight: Tensor, blocksize: int, double_quant: bool
) -> tuple[int, int]:
    try:
        packed, state = quantize_nf4(weight, blocksize, double_quant)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    writer.write(name, packed)
    for suffix, tensor in bnb_layout.encode(state).items():
        writer.write(f"{name}.{suffix}", tensor)
    return weight.nbytes, state.nbytes


def _copy_other_files(source: Path, target: Path) -> None:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    for path in source.iterdir():
        known = (target / path.name).exists() or path.name.endswith((*weights, ".index.json", MANIFEST))
        if path.is_file() and not known:
            shutil.copyfile(path, target / path.name)
