"""A driver that records the calls of compiled kernels' launchers, for the tests of launches."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from python.kernels_report.mock_gpu import MockDriver
from qlora_kernels.backends.triton import partials
from qlora_kernels.backends.triton.launch import Launchable

calls: list[tuple[Any, ...]] = []
"""The arguments of each call of a compiled kernel's launcher."""


class CudaLauncher:
    """Records what it is called with; it has the name by which launches recognize Triton's."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        calls.append(arguments)


class RecordingDriver(MockDriver):
    launcher_cls = CudaLauncher

    class utils(MockDriver.utils):
        @staticmethod
        def load_binary(*_: Any) -> tuple[Any, ...]:
            module = None  # Triton 3.9 would unload any other one by the driver that is active then
            return module, 1234, 32, 0, 1024


def recorded_kernel(monkeypatch: pytest.MonkeyPatch) -> Launchable:
    """Return a kernel without kept launches, sum_partials_kernel from now on, and activate the recording driver."""
    monkeypatch.setattr(driver, "_active", RecordingDriver(80))
    calls.clear()
    fresh = Launchable(triton.jit(partials.sum_partials_kernel.fn))
    monkeypatch.setattr(partials, "sum_partials_kernel", fresh)
    return fresh


def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each launch by Triton itself."""
    seen: list[int] = []
    stock = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return stock(self, *args, **kwargs)

    counted.__module__ = JITFunction.__module__
    monkeypatch.setattr(JITFunction, "run", counted)
    return seen


def addresses(arguments: tuple[Any, ...]) -> list[Any]:
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
