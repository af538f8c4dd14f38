"""States in a mapped file: larger than the permitted memory, and an error if the disk is too small."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_kernels.optim import PagedAdamW, mapped_memory
from qlora_kernels.optim.mapped_memory import MappedMemory, allocate_file
from qlora_kernels.optim.paging_plan import plan_chunks, plan_slots

from . import capped_run
from .runs import parameters, set_gradients

ROOT = Path(__file__).parents[2]
CAP_BYTES = 16 << 20


def capped(page_dir):
    """Run a process under the memory limit."""
    command = [sys.executable, "-m", "tests.optim.capped_run", str(page_dir or "none"), str(CAP_BYTES)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_states_of_four_times_the_memory_cap_train_to_the_same_bits(tmp_path):
    assert capped_run.STATE_BYTES == 4 * CAP_BYTES
    with capped(None) as unpaged, capped(tmp_path) as paged:
        expected, one_chunk, _ = capped_run.train(None, None).split()
        output, errors = paged.communicate()
        _, refusal = unpaged.communicate()
    assert unpaged.returncode == 3, "the cap does not bind"
    assert "allocate memory" in refusal
    assert paged.returncode == 0, errors
    digest, chunks, prefetched = output.split()
    assert digest == expected
    assert (int(one_chunk), int(chunks)) == (1, capped_run.STATE_BYTES // capped_run.CHUNK_BYTES)
    assert int(prefetched) == 3 * capped_run.STATE_BYTES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_an_error_before_the_first_step(monkeypatch, tmp_path, code):
    asked = []

    def full(descriptor, offset, nbytes):
        asked.append((offset, nbytes))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(mapped_memory.os, "posix_fallocate", full)
    message = r"page_dir must have room for 8,192 bytes of optimizer states, got [\d,]+ free"
    with pytest.raises(OSError, match=message) as caught:
        PagedAdamW([nn.Parameter(torch.zeros(1024))], page_dir=tmp_path)
    assert caught.value.errno == code
    assert asked == [(0, 8192)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nbytes", [1, 1 << 20, (2 << 20) + 5])
def test_without_fallocate_the_file_is_written(monkeypatch, tmp_path, nbytes):
    """macOS and Windows have no posix_fallocate, and Windows no madvise; the steps give the same results."""
    monkeypatch.delattr(mapped_memory.os, "posix_fallocate")
    monkeypatch.delattr(mapped_memory.mmap, "MADV_WILLNEED")
    mapped, descriptor = allocate_file(nbytes, tmp_path)
    os.close(descriptor)
    assert len(mapped) == nbytes
    assert mapped[:] == bytes(nbytes)
    params, expected = parameters(), parameters()
    for group, page_dir in ((params, tmp_path), (expected, None)):
        optimizer = PagedAdamW(group, page_dir=page_dir)
        set_gradients(group, 0)
        optimizer.step()
    for mine, theirs in zip(params, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_full_disk_while_the_file_is_written(monkeypatch, tmp_path):
    monkeypatch.delattr(mapped_memory.os, "posix_fallocate")
    monkeypatch.setattr(mapped_memory, "_FILL_BYTES", 4096)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(OSError, match="page_dir must have room for 8,192 bytes"):
            PagedAdamW([nn.Parameter(torch.zeros(1024))], page_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_other_disk_errors_are_unchanged(monkeypatch, tmp_path):
    def broken(descriptor, offset, nbytes):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(mapped_memory.os, "posix_fallocate", broken)
    with pytest.raises(OSError, match="Input/output error"):
        PagedAdamW(parameters(), page_dir=tmp_path)


def test_blocks_are_allocated_up_front_in_a_file_without_a_name(monkeypatch, tmp_path):
    """The blocks of the file itself are counted, because other processes use the same disk."""
    allocated = []

    def allocate(nbytes, page_dir):
        mapped, descriptor = allocate_file(nbytes, page_dir)
        allocated.append(os.fstat(descriptor).st_blocks * 512)
        return mapped, descriptor

    monkeypatch.setattr(mapped_memory, "allocate_file", allocate)
    optimizer = PagedAdamW([nn.Parameter(torch.zeros(4 << 20))], page_dir=tmp_path)
    assert sum(allocated) >= 32 << 20
    assert list(tmp_path.iterdir()) == []
    assert optimizer.paging_report().resident_bytes < 1 << 20


def test_chunks_prefetched_before_use(tmp_path):
    slots, nbytes = plan_slots([3 * 4096 + 5, 20_000], 32)
    chunks = plan_chunks(slots, [0, 0], 40_000)
    memory = MappedMemory(nbytes, chunks, tmp_path, look_ahead=1)
    order = []
    will_need = memory._will_need
    memory._will_need = lambda chunk: (order.append(("fetch", chunks.index(chunk))), will_need(chunk))
    memory.run([0, 2, 3], lambda chunk, arena, segments: order.append(("use", chunks.index(chunk))))
    assert order == [("fetch", 0), ("fetch", 2), ("use", 0), ("fetch", 3), ("use", 2), ("use", 3)]
    assert memory.prefetched_bytes == sum(chunks[i].nbytes for i in (0, 2, 3))


def test_report_counts_mapped_bytes(tmp_path):
    params = [nn.Parameter(torch.zeros(1 << 20))]
    optimizer = PagedAdamW(params, page_dir=tmp_path)
    set_gradients(params, 0)
    optimizer.step()
    report = optimizer.paging_report()
    assert (report.kinds, report.parameters, report.state_bytes) == (("mapped",), 1 << 20, 8 << 20)
    assert report.resident_bytes + report.paged_bytes == report.state_bytes
    assert report.resident_bytes > 0  # written just now; how much stays depends on the memory that is free
    assert str(report) == (
        f"8,388,608 bytes of states for 1,048,576 parameters in 1 chunks (mapped): "
        f"{report.resident_bytes:,} resident, 8,388,608 prefetched"
    )
