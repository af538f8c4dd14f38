"""The checksum of this package's safetensors files, stored in their metadata under "sha256".

It covers every tensor's name, dtype, shape and bytes, in the order of the names, and the other metadata. It does not
depend on the layout of the file. A file that another program rewrites without it is not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

KEY = "sha256"
_MOST_THREADS = 8
"""Maximum number of threads; one core hashes 1.3 to 2 GB/s, so that more would be limited by memory bandwidth."""
_WORTH_THREADS = 8 << 20
"""Bytes that are hashed at once."""


class Checksum:
    """Checksum of tensors that are added one by one in any order."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[str, list[int], str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor on any device and of any layout."""
        self._tensors[name] = (str(tensor.dtype), list(tensor.shape), _digest(tensor))

    def add_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Add many tensors, in threads; both hashlib and page faults release Python's global lock."""
        workers = min(_MOST_THREADS, os.cpu_count() or 1, len(tensors))
        if workers < 2 or sum(tensor.nbytes for tensor in tensors.values()) < _WORTH_THREADS:
            for name, tensor in tensors.items():
                self.add(name, tensor)
            return
        with ThreadPoolExecutor(workers) as pool:
            for (name, tensor), digest in zip(tensors.items(), pool.map(_digest, tensors.values()), strict=True):
                self._tensors[name] = (str(tensor.dtype), list(tensor.shape), digest)

    def hexdigest(self, metadata: Mapping[str, str]) -> str:
        """Return the digest.   metadata: of the file; its entry for the checksum is left out."""
        others = {key: value for key, value in metadata.items() if key != KEY}
        return hashlib.sha256(json.dumps([self._tensors, others], sort_keys=True).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()
