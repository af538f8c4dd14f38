"""The checksum that this package's safetensors files carry in their metadata, under "sha256".

It covers every tensor's name, dtype, shape and bytes, in the order of the names, and the other metadata; so it does not
depend on how the file is laid out, and a file that another program writes anew, without it, is simply not checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

KEY = "sha256"


class Checksum:
    """Of tensors that are added one by one, in any order."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[str, list[int], str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """tensor: on any device, of any layout."""
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._tensors[name] = (str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest())

    def hexdigest(self, metadata: Mapping[str, str]) -> str:
        """metadata: of the file, whose own entry for the checksum does not count."""
        others = {key: value for key, value in metadata.items() if key != KEY}
        return hashlib.sha256(json.dumps([self._tensors, others], sort_keys=True).encode()).hexdigest()
