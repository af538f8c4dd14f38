"""Unified and page-locked memory of a CUDA device: five functions that only the cuda backend implements.

Kernel contracts, each a KernelSpec of backends/cuda:
    managed_concurrent_access(device: int) -> bool        whether the GPU migrates unified memory on page faults
    managed_alloc(nbytes: int, device: int) -> Tensor     uint8 [nbytes] on cuda:device, zeroed on the current stream,
                                                          freed by the tensor's deleter; RuntimeError on failure
    page_locked_alloc(nbytes: int, device: int) -> Tensor uint8 [nbytes] of zeros in page-locked host memory, of exactly
                                                          this size; freed by the tensor's deleter, which waits for the
                                                          device; RuntimeError on failure
    managed_prefer_device(arena: Tensor) -> None          preferred location: the device; accessed by: the CPU
    managed_prefetch(arena: Tensor, start: int, stop: int) -> None
                                                          bytes [start, stop) to the device, on the current stream
These are not torch ops: they manage memory and have no meaning in a traced graph. Each of them loads the library when
it is the first to need it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import kernels_of, unavailable


def managed_concurrent_access(device: torch.device) -> bool | None:
    """Whether `device` migrates unified memory on page faults; None if the cuda backend is not available."""
    if unavailable("cuda") is not None or "managed_concurrent_access" not in kernels_of("cuda"):
        return None
    return bool(_run("managed_concurrent_access", device.index))


def managed_alloc(nbytes: int, device: torch.device) -> Tensor:
    """Return uint8 [nbytes] of zeros in unified memory, freed with its last reference. Raises RuntimeError on
    failure.
    """
    arena: Tensor = _run("managed_alloc", nbytes, device.index)
    return arena


def page_locked_alloc(nbytes: int, device: torch.device) -> Tensor:
    """Return uint8 [nbytes] of zeros in page-locked host memory. Raises RuntimeError on failure.

    torch's allocator would round the size up to a power of two, so that states of 40 GB would lock 64 GB.
    """
    arena: Tensor = _run("page_locked_alloc", nbytes, device.index)
    return arena


def managed_prefer_device(arena: Tensor) -> None:
    """Advise the driver that the arena's preferred location is its device and that the CPU accesses it by mapping."""
    _run("managed_prefer_device", arena)


def managed_prefetch(arena: Tensor, start: int, stop: int) -> None:
    """Migrate bytes [start, stop) to the arena's device, on the current stream."""
    _run("managed_prefetch", arena, start, stop)


def _run(name: str, *arguments: Any) -> Any:
    # `unavailable` loads the library, once.
    if (reason := unavailable("cuda")) is not None:
        raise RuntimeError(f"{name}: the cuda backend must be available, got: {reason}")
    return kernels_of("cuda")[name].run(*arguments)
