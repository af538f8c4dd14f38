"""Optimizer states in a memory-mapped file, paged by the operating system and limited by the disk's size.

The file has no name, so that it is removed when the process ends for any reason. Its blocks are allocated on
construction, so that a full disk raises then, instead of a SIGBUS during a run. While the kernel updates one chunk, the
next ones are requested with MADV_WILLNEED.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import numpy as np
import torch

from ..rounding import cdiv
from .paging_plan import Chunk, plan_schedule
from .state_memory import Update, segment_table

_FILL_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MappedMemory:
    """An arena in an unnamed memory-mapped file in `page_dir`."""

    kind = "mapped"

    def __init__(self, nbytes: int, chunks: tuple[Chunk, ...], page_dir: str | Path, *, look_ahead: int) -> None:
        self.look_ahead = look_ahead
        self.prefetched_bytes = 0
        self._map, self._file = allocate_file(max(nbytes, 1), Path(page_dir))
        weakref.finalize(self, os.close, self._file)
        self._process = os.getpid()
        # The tensor keeps the mapping alive, and its views keep the tensor alive; the last one unmaps it.
        self.arena = torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes) if nbytes else torch.empty(0).byte()
        self.replan(chunks)
        _in_children.add(self)

    def replan(self, chunks: tuple[Chunk, ...]) -> None:
        self.chunks = chunks
        self._segments = [segment_table(chunk.segments) for chunk in chunks]

    def run(self, active: Sequence[int], update: Update) -> None:
        for action in plan_schedule(len(active), self.look_ahead):
            index = active[action.chunk]
            if action.kind == "update":
                update(self.chunks[index], self.arena, self._segments[index])
            else:
                self._will_need(self.chunks[index])

    def _will_need(self, chunk: Chunk) -> None:
        for start, stop in chunk.ranges if hasattr(mmap, "MADV_WILLNEED") else ():  # not available on Windows
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, stop - first)
        self.prefetched_bytes += chunk.nbytes

    def settle(self) -> None:
        """Do nothing: the tensors' memory is the file's page cache."""

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child, which shares the file with its parent."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"PagedAdamW: the states in page_dir belong to process {self._process}, which goes on changing them, "
                f"got a call in its fork {os.getpid()}; make a new optimizer there"
            )

    def make_private(self) -> None:
        """In a forked child, make writes through the state tensors private to the child.

        Raises OSError if the system cannot map the file again.
        """
        remap = ctypes.CDLL(None, use_errno=True).mmap
        remap.restype = ctypes.c_void_p
        remap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        address, protection = self.arena.data_ptr(), mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        if remap(address, len(self._map), protection, flags, self._file, 0) != address:
            raise OSError(ctypes.get_errno(), "PagedAdamW: a forked child could not unshare the states in page_dir")

    def resident_bytes(self) -> int | None:
        """Return the bytes in memory by mincore(2), which include the file's page cache."""
        mincore = None if os.name == "nt" else getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
        if mincore is None:
            return None
        pages = cdiv(len(self._map), mmap.PAGESIZE)
        resident = np.zeros(pages, dtype=np.uint8)
        pointers = ctypes.c_void_p(self.arena.data_ptr()), ctypes.c_size_t(len(self._map))
        if mincore(*pointers, ctypes.c_void_p(resident.ctypes.data)) != 0:
            return None
        return min(int((resident & 1).sum()) * mmap.PAGESIZE, self.arena.nbytes)


def _fill(file: FileIO, nbytes: int) -> None:
    """Fill an empty file with `nbytes` of allocated zeros. Raises OSError if the disk has no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return
    # On macOS and Windows, blocks are allocated by writing them.
    zeros, left = bytes(_FILL_BYTES), nbytes
    while left > 0:
        left -= file.write(zeros[:left])


_MAP_FIXED = 0x10

_in_children: weakref.WeakSet[MappedMemory] = weakref.WeakSet()


def _make_all_private() -> None:
    for memory in _in_children:
        memory.make_private()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_all_private)


def allocate_file(nbytes: int, page_dir: Path) -> tuple[mmap.mmap, int]:
    """Return the mapping of a new unnamed file of `nbytes` bytes, which are allocated on disk, and its descriptor.

    Raises ValueError if `page_dir` is no directory, and OSError if it has no room.
    """
    if not page_dir.is_dir():
        raise ValueError(f"PagedAdamW: page_dir must be an existing directory, got {page_dir}")
    with tempfile.TemporaryFile(dir=page_dir, prefix="optimizer-states-", buffering=0) as file:
        try:
            _fill(file, nbytes)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            free = shutil.disk_usage(page_dir).free
            message = (
                f"PagedAdamW: page_dir must have room for {nbytes:,} bytes of optimizer states, got {free:,} free in "
                f"{page_dir}; choose another directory or state_bits=8"
            )
            raise OSError(error.errno, message) from error
        return mmap.mmap(file.fileno(), nbytes), os.dup(file.fileno())
