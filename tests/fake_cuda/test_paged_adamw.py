"""PagedAdamW's unified memory: states larger than the device's memory, and the error without unified memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

import qlora_kernels as qk
from tests.support.fake_cuda import FakeDevice
from tests.support.problems import gaussian

pytestmark = pytest.mark.usefixtures("without_collector")

SIZES = (300_000, 70, 200_000)


def run(on: str, bits: int, limits: Callable[[], AbstractContextManager[None]]) -> list[torch.Tensor]:
    """Return parameters after two steps whose states are several chunks; made and stepped within limits()."""
    params = [torch.nn.Parameter(gaussian(n, seed=n).to(on)) for n in SIZES]
    for param in params:
        param.grad = torch.empty_like(param)
    with limits(), qk.PagedAdamW(params, lr=1e-2, state_bits=bits) as optimizer:
        for step in range(2):
            for param in params:
                assert param.grad is not None
                param.grad.copy_(gaussian(param.numel(), seed=step))
            optimizer.step()
        if on == "cuda":
            assert optimizer.paging_report().kinds == ("managed",)
            assert optimizer.paging_report().prefetched_bytes > 0
            assert optimizer.paging_report().chunks > 2
    return [param.detach().cpu() for param in params]


@pytest.mark.parametrize("bits", [32, 8])
def test_states_larger_than_device_memory(device: FakeDevice, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parameters and gradients, the device has no room for the states; the result equals the CPU's."""
    monkeypatch.setattr("qlora_kernels.optim.state_placement.CHUNK_BYTES", (1 << 20) * bits // 32)

    def no_more_than_now() -> AbstractContextManager[None]:
        torch.cuda.empty_cache()
        return device.memory(device.allocated(), 1 << 30)

    expected = run("cpu", bits, nullcontext)
    with qk.use_backend("cuda"):
        actual = run("cuda", bits, no_more_than_now)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_no_managed_memory(device: FakeDevice) -> None:
    """The optimizer cannot be made and nothing is kept; it can be made once there is memory."""
    param = torch.nn.Parameter(torch.ones(100_000, device="cuda"))
    before = device.allocated()
    with (
        qk.use_backend("cuda"),
        device.memory(1 << 30, 4096),
        pytest.raises(
            RuntimeError, match=r"^managed_alloc: \d+ bytes of unified memory: cudaErrorMemoryAllocation: out"
        ),
    ):
        qk.PagedAdamW([param])
    assert device.pending_error() == 0
    assert device.allocated() <= before + (2 << 20)
    with qk.use_backend("cuda"), qk.PagedAdamW([param]) as optimizer:
        param.grad = torch.ones_like(param)
        optimizer.step()


def test_states_are_freed(device: FakeDevice) -> None:
    param = torch.nn.Parameter(torch.ones(1_000_000, device="cuda"))
    torch.cuda.empty_cache()
    before = device.allocated()
    optimizer = qk.PagedAdamW([param])
    assert device.allocated() >= before + 8_000_000
    optimizer.close()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert device.allocated() == before


def stepped(steps: int) -> tuple[list[torch.Tensor], qk.PagedAdamW]:
    """Return parameters on the device after some steps, and their optimizer."""
    params = [torch.nn.Parameter(gaussian(n, seed=n).cuda()) for n in SIZES]
    optimizer = qk.PagedAdamW(params, lr=1e-2)
    for step in range(steps):
        for param in params:
            param.grad = gaussian(param.numel(), seed=step).cuda()
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("concurrent", [True, False], ids=["managed", "staged"])
def test_events_are_used_again(device: FakeDevice, monkeypatch: pytest.MonkeyPatch, concurrent: bool) -> None:
    monkeypatch.setattr("qlora_kernels.optim.state_placement.CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr("qlora_kernels.optim.managed_memory.managed_concurrent_access", lambda device: concurrent)
    with qk.use_backend("cuda"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the device has no concurrent managed access
        _, optimizer = stepped(1)
        assert optimizer.paging_report().chunks > 3
        with device.recorded_calls() as calls:
            optimizer.step()
        optimizer.close()
    assert "cudaEventRecord" in calls or "cudaEventRecordWithFlags" in calls
    assert not any(call.startswith("cudaEventCreate") for call in calls)


def test_staged_states_are_in_page_locked_memory_of_their_own_size(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without concurrent managed access; the size is no power of two, and the memory is freed."""
    monkeypatch.setattr("qlora_kernels.optim.state_placement.CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr("qlora_kernels.optim.managed_memory.managed_concurrent_access", lambda device: False)
    expected = run("cpu", 32, nullcontext)
    with qk.use_backend("cuda"):
        with warnings.catch_warnings(), device.recorded_calls("backends/cuda/_C") as calls:
            warnings.simplefilter("ignore")  # that the device has no concurrent managed access
            params, optimizer = stepped(2)
        assert calls.count("cudaMallocHost") == 1
        assert optimizer.paging_report().kinds == ("staged",)
        arena = optimizer._placement.arenas[0].memory.arena
        assert arena.is_pinned()
        assert arena.numel() < 2 * 4 * sum(SIZES) + 4096
        for param, e in zip(params, expected, strict=True):
            assert torch.equal(param.detach().cpu(), e)
        del arena
        with device.recorded_calls("backends/cuda/_C") as calls:
            optimizer.close()
        assert "cudaFreeHost" in calls


def test_no_page_locked_memory(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kernels.optim.managed_memory.managed_concurrent_access", lambda device: False)
    param = torch.nn.Parameter(torch.ones(5000, device="cuda"))
    with (
        qk.use_backend("cuda"),
        device.failing(2, call="cudaMallocHost"),
        pytest.raises(RuntimeError, match=r"^page_locked_alloc: \d+ bytes of page-locked memory: cudaErrorMemoryAlloc"),
    ):
        qk.PagedAdamW([param])
    assert device.pending_error() == 0
