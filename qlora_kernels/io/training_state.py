"""Checkpoints with a training run's whole state, one safetensors file each, for bit-exact resumption.

    state = load_latest("run")                                  # None on a fresh start
    if state is not None:
        model.load_state_dict(state.parts["adapter"], strict=False)
        state.restore({"optimizer": optimizer, "scheduler": scheduler})
        first_step, first_batch = state.step, state.parts["data"]["batch"]
    for step in range(...):
        ...
        save_training_state(
            "run",
            step + 1,
            {"adapter": adapter_tensors, "optimizer": optimizer, "scheduler": scheduler, "data": {"batch": batch}},
        )

The random number generators (torch on every device, numpy, random) are saved and restored with the parts, so that a run
that was killed at any time continues with the same bits. Tensors are streamed to the file one by one; states in
memory-mapped pages are not gathered in memory first. All other values are JSON in the file's metadata, with floats
exact by Python's shortest repr. Nothing is pickled, so that loading a file runs no code.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .atomic import file_appearing_by_rename, make_folder
from .safetensors_reader import DamagedFileError, read_safetensors
from .safetensors_writer import DTYPE_NAMES, SafetensorsWriter

_FILE = re.compile(r"step-(\d+)\.safetensors")
_METADATA_KEY = "training_state"
_RNG = "rng"
_MAPPINGS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "counter": Counter}


@runtime_checkable
class Stateful(Protocol):
    """An object with a state dict, such as an optimizer, scheduler, gradient scaler or module."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object: ...


@dataclass(frozen=True)
class TrainingState:
    """A loaded checkpoint: `step` as saved, and each part as the plain value or state_dict that was saved."""

    step: int
    parts: dict[str, Any]
    rng: dict[str, Any]

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Load the named parts' state dicts, and restore every random number generator.

        Raises KeyError, with the names in the file, for a part that was not saved.
        """
        for name, part in parts.items():
            if name not in self.parts:
                raise KeyError(
                    f"TrainingState.restore: no part {name!r} was saved; the file holds {sorted(self.parts)}"
                )
            part.load_state_dict(self.parts[name])
        _restore_rng(self.rng)


def save_training_state(directory: str | Path, step: int, parts: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write directory/step-XXXXXXXX.safetensors, then delete all but the `keep` newest. Returns the file's path.

    step: number by which `load_latest` orders checkpoints, usually the number of finished optimizer steps.
    parts: name -> an object with state_dict(), or nested dicts, lists, tuples, tensors, numbers, strings and None. If
    the object has a `packed_state_dict()`, it is used (PagedAdamW: 8-bit states stay 8-bit).
    The file is complete and flushed (fsync) before it gets its name, so that a kill at any moment leaves the previous
    checkpoint. It has a checksum, by which loading detects damage.
    Raises TypeError, naming the place, for a value that neither JSON nor safetensors can represent; OSError for disk
    errors, after the partial file is removed.
    """
    if step < 0:
        raise ValueError(f"save_training_state: step must be >= 0, got {step}")
    if keep < 1:
        raise ValueError(f"save_training_state: keep must be >= 1, got {keep}")
    directory = Path(directory)
    make_folder(directory)
    tensors: dict[str, Tensor] = {}
    tree = {
        "step": step,
        "parts": _pack({name: _state_of(part) for name, part in parts.items()}, "parts", tensors),
        _RNG: _pack(_capture_rng(), _RNG, tensors),
    }
    path = directory / f"step-{step:08d}.safetensors"
    metadata = {_METADATA_KEY: json.dumps(tree)}
    with file_appearing_by_rename(path) as partial:
        writer = SafetensorsWriter(partial, tensors, metadata, checksum=True)
        with writer:  # closes the file before it gets its name
            for name, tensor in tensors.items():
                writer.write(name, tensor)
    for _, old in _checkpoints(directory)[:-keep]:
        old.unlink(missing_ok=True)  # another process may have removed it
    return path


def load_latest(directory: str | Path) -> TrainingState | None:
    """Load the checkpoint with the highest step in `directory` to the CPU; return None if there is none.

    A damaged checkpoint is skipped with a warning, and the one before it is loaded. Raises DamagedFileError if all are
    damaged.
    """
    damaged: dict[Path, DamagedFileError] = {}
    while checkpoints := [path for _, path in _checkpoints(Path(directory)) if path not in damaged]:
        try:
            return load_training_state(checkpoints[-1])
        except FileNotFoundError:
            continue  # removed by a running process, which has saved newer ones
        except DamagedFileError as error:
            warnings.warn(f"load_latest: {error}; loading the previous checkpoint", stacklevel=2)
            damaged[checkpoints[-1]] = error
    if damaged:
        raise next(iter(damaged.values()))
    return None


def load_training_state(path: str | Path) -> TrainingState:
    """Load the checkpoint in one file.

    Raises DamagedFileError for a file that was cut short or changed; ValueError if it was not written by
    `save_training_state`.
    """
    mapped, metadata = read_safetensors(path)
    # The tensors are copied, because mapped ones have any alignment, which changes the rounding of matrix products.
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    try:
        tree = json.loads(metadata[_METADATA_KEY])
        return TrainingState(tree["step"], _unpack(tree["parts"], tensors), _unpack(tree[_RNG], tensors))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"load_training_state: path must be a file of save_training_state, got {path}") from error


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    matches = ((_FILE.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _state_of(part: Any) -> Any:
    if hasattr(part, "packed_state_dict"):
        return part.packed_state_dict()
    return part.state_dict() if isinstance(part, Stateful) else part


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Convert `value` to JSON: tensors move to `tensors` under their place; tuples and dicts are tagged."""
    if isinstance(value, Tensor):
        if value.dtype not in DTYPE_NAMES:
            raise TypeError(f"save_training_state: {place} must be of a dtype that safetensors has, got {value.dtype}")
        name = place if place not in tensors else f"{place}#{len(tensors)}"  # {"a.b": t} beside {"a": {"b": t}}
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        tag = "counter" if isinstance(value, Counter) else "dict"
        return {tag: [[_pack(k, place, tensors), _pack(v, f"{place}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"save_training_state: {place} must be plain data or tensors, got {type(value).__name__}")


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    [(tag, content)] = node.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return _MAPPINGS[tag]({_unpack(key, tensors): _unpack(item, tensors) for key, item in content})


def _capture_rng() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "random": random.getstate(),
    }


def _restore_rng(rng: dict[str, Any]) -> None:
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(rng["cuda"])
    np.random.set_state(rng["numpy"])
    random.setstate(rng["random"])
