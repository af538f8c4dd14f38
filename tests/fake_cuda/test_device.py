"""The fake device as torch sees it; the other tests of this folder rely on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_kernels as qk
from tests.support.fake_cuda import FakeDevice

ROOT = Path(__file__).parents[2]


def test_the_backend_is_available() -> None:
    """Without this test, tests/gpu could be skipped unnoticed."""
    assert qk.backends()["cuda"].startswith("available")


def test_lazy_stream_runs_when_waited_for(device: FakeDevice) -> None:
    device.set_schedule("lazy")
    source, target = torch.ones(64).pin_memory(), torch.empty(64, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    source.fill_(2)  # too early: the copy has not run
    side.synchronize()
    assert target.tolist() == [2.0] * 64


def test_eager_stream_runs_immediately(device: FakeDevice) -> None:
    device.set_schedule("eager")
    source, target = torch.ones(64).pin_memory(), torch.empty(64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        target.copy_(source, non_blocking=True)
    source.fill_(2)
    assert target.tolist() == [1.0] * 64


def test_fresh_memory_is_not_zero() -> None:
    torch.cuda.empty_cache()
    assert torch.empty(3 << 20, dtype=torch.uint8, device="cuda")[-1].item() != 0


@pytest.mark.parametrize(
    ("driver_version", "says"),
    [
        (12080, "the NVIDIA driver supports CUDA 12.8 and torch's runtime is CUDA 13.0, which needs driver 580"),
        (13000, ""),
    ],
)
def test_driver_versions(driver_version: int, says: str) -> None:
    """Under an old driver, torch has no device, and the backend gives the reason."""
    program = f"""
from tests.support import fake_cuda
fake_cuda.activate(driver_version={driver_version})
import torch, warnings
warnings.simplefilter("ignore")
import qlora_kernels as qk
print(torch.cuda.is_available(), qk.backends()["cuda"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    available, _, state = done.stdout.partition(" ")
    assert available == str(not says)
    assert state.startswith(says or "available")
