"""Unified and page-locked memory: the kernel contracts of ops/managed_memory.py over csrc/cuda/managed_memory.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_C = torch.ops.qlora_kernels_C


def managed_concurrent_access(device: int) -> bool:
    """Whether the GPU migrates unified memory on page faults."""
    return bool(_C.cuda_managed_concurrent_access(device))


def managed_alloc(nbytes: int, device: int) -> Tensor:
    """Return uint8 [nbytes] on cuda:device, zeroed on its current stream, freed with its last reference."""
    stream_of = torch.empty(0, device=torch.device("cuda", device))
    return tensor_of(_C.cuda_managed_allocate(stream_of, nbytes))


def page_locked_alloc(nbytes: int, device: int) -> Tensor:
    """Return uint8 [nbytes] of zeros in page-locked host memory, freed with its last reference."""
    stream_of = torch.empty(0, device=torch.device("cuda", device))
    return tensor_of(_C.cuda_page_locked_allocate(stream_of, nbytes))


def tensor_of(address: int) -> Tensor:
    """Return a tensor that owns the DLManagedTensor at `address`."""
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    tensor: Tensor = torch.utils.dlpack.from_dlpack(new_capsule(address, b"dltensor", None))
    return tensor


def managed_prefer_device(arena: Tensor) -> None:
    """Set the arena's device as its preferred location, and let the CPU access it by mapping."""
    _C.cuda_managed_prefer_device(arena)


def managed_prefetch(arena: Tensor, start: int, stop: int) -> None:
    """Migrate bytes [start, stop) to the arena's device, on the current stream."""
    _C.cuda_managed_prefetch(arena, start, stop)
