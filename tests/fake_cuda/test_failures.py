"""Failing runtime calls: each op raises an error with its name and CUDA's reason, and the next call works."""

from __future__ import annotations

import gc
import time

import pytest
import torch

import qlora_kernels as qk
from tests.support.fake_cuda import FakeDevice

from .calls import CALLS, check

pytestmark = pytest.mark.usefixtures("without_collector")

LIBRARY = "backends/cuda/_C"
OPS = {
    "quantize_nf4",
    "quantize_absmax",
    "dequantize_nf4",
    "linear_nf4",
    "linear_nf4_grad_x",
    "linear_nf4_lora",
    "linear_nf4_lora_merged",
    "adamw_step",
    "managed_alloc",
    "managed_concurrent_access",
    "managed_prefer_device",
    "managed_prefetch",
    "page_locked_alloc",
}
"""Permitted beginnings of an error's message."""

NO_KERNEL_IMAGE, ILLEGAL_ADDRESS = 209, 700


def test_each_failing_runtime_call_raises(device: FakeDevice) -> None:
    """The 1st, 2nd, ... runtime call that the compiled library makes during an op fails."""
    with qk.use_backend("cuda"):
        for name, call in CALLS.items():
            with device.recorded_calls(LIBRARY) as made:
                check(name, call("cuda"))
            assert made, f"{name}: the compiled library made no runtime call"
            allocated = _allocated_at_most(device, None)  # not 0: earlier tests of this process may hold memory
            for after in range(len(made)):
                with device.failing(ILLEGAL_ADDRESS, caller=LIBRARY, after=after):
                    try:
                        call("cuda")
                        raised = None
                    except RuntimeError as error:
                        raised = str(error)
                    assert device.failed(), f"{name}: call {after} was not made"
                where = f"{name}, {made[after]} (call {after + 1} of {len(made)})"
                if made[after] != "cudaFree":  # made by a deleter, which cannot report; the memory is not freed
                    assert raised is not None, f"{where}: the failure was swallowed"
                    assert raised.endswith("cudaErrorIllegalAddress: an illegal memory access was encountered"), where
                    assert raised.split(":")[0] in OPS, where
                assert device.pending_error() == 0, f"{where}: the error is left for the next kernel launch to report"
                assert made[after] == "cudaFree" or _allocated_at_most(device, allocated) <= allocated, (
                    f"{where}: memory leaks"
                )
            check(name, call("cuda"))


def _allocated_at_most(device: FakeDevice, bound: int | None) -> int:
    """Return the bytes that are allocated once they are no more than `bound`, or after a minute; None does not wait.

    A failed backward pass is released by autograd's thread of the device, and by the garbage collector where the
    error's traceback is part of a cycle.
    """
    deadline = time.monotonic() + 60
    if bound is None:
        gc.collect()
    while True:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated = device.allocated()
        if bound is None or allocated <= bound or time.monotonic() > deadline:
            return allocated
        gc.collect()
        time.sleep(0.05)


def test_a_library_without_kernels_for_this_gpu(device: FakeDevice) -> None:
    x = torch.ones(64, device="cuda")
    with (
        qk.use_backend("cuda"),
        device.failing(NO_KERNEL_IMAGE, caller=LIBRARY),
        pytest.raises(
            RuntimeError, match=r"quantize_nf4: the CUDA kernels were built for .*, this GPU is sm_80; rebuild"
        ),
    ):
        qk.quantize_nf4(x, 64, False)
    assert device.pending_error() == 0


def test_no_memory_for_a_result(device: FakeDevice) -> None:
    """torch's allocation fails with torch's error, and no memory of this library is leaked."""
    w = torch.ones(1 << 20, device="cuda")
    with qk.use_backend("cuda"):
        packed, state = qk.quantize_nf4(w)
        torch.cuda.empty_cache()
        free = 1 << 20
        with device.memory(device.allocated() + free, 1 << 30), pytest.raises(torch.OutOfMemoryError):
            [qk.dequantize_nf4(packed, state) for _ in range(8)]
        assert torch.equal(qk.dequantize_nf4(packed, state), w)
