"""The tensors in which bitsandbytes stores an NF4 weight `<name>` in a checkpoint.

    <name>                                     packed indices, uint8 [(numel + 1) // 2, 1]
    <name>.absmax                              fp32 [n_blocks], or uint8 [n_blocks] under double quantization
    <name>.quant_map                           fp32 [16], the code
    <name>.nested_absmax                       fp32 [ceil(n_blocks / 256)]        } only under
    <name>.nested_quant_map                    fp32 [256], the dynamic map        } double quantization
    <name>.quant_state.bitsandbytes__nf4       uint8: JSON with quant_type, blocksize, dtype, shape and, under double
                                               quantization, nested_blocksize, nested_dtype, nested_offset

Reading checks everything that this codec fixes (code, map, nested blocksize), so that a file of another codec is
refused and never misread.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import nf4
from .double_quant import NESTED_BLOCKSIZE, dynamic_map
from .quant_state import QuantState

META_KEY = "quant_state.bitsandbytes__nf4"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", META_KEY)
"""Suffixes that may follow `<name>.`."""
TABLES = {"quant_map": nf4.code, "nested_quant_map": dynamic_map}
"""Suffix -> function of a device that returns the table of this format."""


@dataclass(frozen=True)
class Meta:
    """Contents of the JSON entry.   offset: of the second level; None without double quantization."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    offset: float | None


def encode(state: QuantState) -> dict[str, Tensor]:
    """Return the tensors that accompany the packed bytes, by suffix."""
    absmax, absmax_q, absmax_scale, absmax_offset = state.constants
    if absmax is not None:
        tensors = {"absmax": absmax}
    elif absmax_q is not None and absmax_scale is not None:
        tensors = {"absmax": absmax_q, "nested_absmax": absmax_scale}
    made = tables(state.blocksize, state.dtype, tuple(state.shape), absmax_offset, tensors["absmax"].device)
    return {suffix: (tensors | made)[suffix] for suffix in SUFFIXES if suffix in tensors or suffix in made}


def tables(
    blocksize: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    absmax_offset: Tensor | None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Return the entries of `encode` that are not constants of the weight: code, map and JSON.

    absmax_offset: fp32 with one element; None without double quantization.
    """
    device = torch.device("cpu") if device is None else device
    meta: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    tensors = {"quant_map": nf4.code(device)}
    if absmax_offset is not None:
        tensors["nested_quant_map"] = dynamic_map(device)
        meta |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": absmax_offset.item(),
        }
    tensors[META_KEY] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    return tensors


def read_meta(name: str, stored: Tensor) -> Meta:
    """Parse the JSON entry of the weight `name`. Raises ValueError for another codec or invalid values."""
    meta = _read_meta(name, stored)
    double_quant = "nested_offset" in meta or "nested_blocksize" in meta
    return Meta(*_read_codec(name, meta), _read_offset(name, meta).item() if double_quant else None)


def quantization_config(double_quant: bool, compute_dtype: torch.dtype, dense: Collection[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a config.json, as transformers' BitsAndBytesConfig writes it.

    dense: names of the linear layers that are not quantized; names of other modules are allowed.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted({*dense} - {""}),
    }


def stored_shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of the weight with these tensors, by suffix. Raises ValueError if they do not determine it."""
    return _read_shape(name, _read_meta(name, tensors[META_KEY]))


def decode(name: str, tensors: Mapping[str, Tensor]) -> QuantState:
    """Return the QuantState of the tensors of `encode`, by suffix.   name: for messages.

    Raises ValueError if a tensor is missing or another code, map or nested blocksize was used.
    """
    missing = [suffix for suffix in ("absmax", META_KEY) if suffix not in tensors]
    if missing:
        raise ValueError(f"{name}: checkpoint must hold {name}.{missing[0]}, got only {sorted(tensors)}")
    meta = _read_meta(name, tensors[META_KEY])
    _require(name, "quant_type", meta.get("quant_type"), "nf4")
    absmax = tensors["absmax"]
    device = absmax.device
    if "quant_map" in tensors:
        check_tables(name, {"quant_map": tensors["quant_map"]})
    shape, dtype, blocksize = _read_codec(name, meta)
    if absmax.dtype != torch.uint8:
        _require_finite(name, "absmax", absmax)
        return QuantState(torch.Size(shape), dtype, blocksize, absmax=absmax)
    for suffix in ("nested_absmax", "nested_quant_map"):
        if suffix not in tensors:
            raise ValueError(f"{name}: checkpoint must hold {name}.{suffix} beside 8-bit absmax, got {sorted(tensors)}")
    absmax_offset = _read_offset(name, meta).to(device)
    check_tables(name, {"nested_quant_map": tensors["nested_quant_map"]})
    _require_finite(name, "nested_absmax", tensors["nested_absmax"])
    return QuantState(
        torch.Size(shape),
        dtype,
        blocksize,
        absmax_q=absmax,
        absmax_scale=tensors["nested_absmax"],
        absmax_offset=absmax_offset,
    )


def check_tables(name: str, tables: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a stored code or map, by suffix, is not that of this format.   name: for messages."""
    for suffix, table in tables.items():
        _require_table(name, suffix, table, TABLES[suffix](table.device))


def _read_meta(name: str, stored: Tensor) -> dict[str, Any]:
    try:
        meta = json.loads(bytes(stored.cpu().tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}: {META_KEY} must be JSON in bytes ({error})") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{name}: {META_KEY} must be a JSON object, got a {type(meta).__name__}")
    return meta


def _read_codec(name: str, meta: Mapping[str, Any]) -> tuple[tuple[int, ...], torch.dtype, int]:
    """Return (shape, dtype, blocksize) of the weight."""
    _require(name, "quant_type", meta.get("quant_type"), "nf4")
    dtype, shape, blocksize = _DTYPES.get(str(meta.get("dtype"))), _read_shape(name, meta), meta.get("blocksize")
    if dtype is None:
        raise ValueError(f"{name}: dtype of the checkpoint must be one of {list(_DTYPES)}, got {meta.get('dtype')!r}")
    if type(blocksize) is not int:
        raise ValueError(f"{name}: blocksize of the checkpoint must be an integer, got {blocksize!r}")
    return shape, dtype, blocksize


def _read_offset(name: str, meta: Mapping[str, Any]) -> Tensor:
    """Return the offset of the second level, fp32 []."""
    _require(name, "nested_blocksize", meta.get("nested_blocksize"), NESTED_BLOCKSIZE)
    offset = meta.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float):
        raise ValueError(f"{name}: nested_offset of the checkpoint must be a number, got {offset!r}")
    absmax_offset = torch.tensor(float(offset), dtype=torch.float32)
    _require_finite(name, "nested_offset", absmax_offset)
    return absmax_offset


def _read_shape(name: str, meta: Mapping[str, Any]) -> tuple[int, ...]:
    shape = meta.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError(f"{name}: shape of the checkpoint must be a list of sizes, got {shape!r}")
    return tuple(shape)


def _require_finite(name: str, field: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{name}: {field} of the checkpoint must be finite, got inf or NaN")


def _require(name: str, field: str, value: object, expected: object) -> None:
    if value != expected:
        raise ValueError(f"{name}: {field} of the checkpoint must be {expected!r}, got {value!r}")


def _require_table(name: str, field: str, value: Tensor, expected: Tensor) -> None:
    if value.shape != expected.shape or not torch.equal(value.to(expected.device, torch.float32), expected):
        raise ValueError(f"{name}: {field} of the checkpoint must be this format's table, got another one")
