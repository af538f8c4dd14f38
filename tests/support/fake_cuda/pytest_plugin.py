"""pytest -p tests.support.fake_cuda.pytest_plugin: two fake devices, and each GPU test under every schedule."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import fake_cuda
from tests.support.fake_cuda.device import SCHEDULES

DEVICE = fake_cuda.activate(devices=2, log=os.environ.get("FAKE_CUDA_LOG", ""))

from tests.support.fake_cuda import host_ops  # noqa: E402 - imports torch
from tests.support.problems import Shape  # noqa: E402

host_ops.install()

_FOLDERS = ("tests/gpu/", "tests/fake_cuda/")


_LARGEST_WEIGHT = 1 << 20
"""Number of elements above which tests are skipped, because the emulator takes seconds for more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests that the fake device cannot run in reasonable time."""
    for item in items:
        if item.nodeid.startswith("tests/gpu/") and (reason := _reason_to_skip(item)):
            item.add_marker(pytest.mark.skip(reason=f"fake device: {reason}"))


def _reason_to_skip(item: pytest.Item) -> str | None:
    parameters = getattr(item, "callspec", None)
    values = parameters.params if parameters is not None else {}
    shape = values.get("shape")
    if values.get("backend") == "triton" and not _shares_compiled_kernels(item, values):
        return "each kind of call takes seconds to compile; tests/fake_cuda/test_triton.py has one of each kernel"
    if "test_compiles_without_graph_breaks" in item.nodeid:
        return "Inductor's kernels are Triton's"
    if values.get("numel", 0) >= _LARGEST_WEIGHT or (shape is not None and shape.N * shape.K >= _LARGEST_WEIGHT):
        return "too large for the emulator"
    return None


def _shares_compiled_kernels(item: pytest.Item, values: dict[str, Any]) -> bool:
    """Whether a test of Triton runs the kernels that tests/fake_cuda/test_triton.py runs."""
    if not item.nodeid.startswith("tests/gpu/test_ops.py::test_linear_lora"):
        return False
    return str(values["shape"]) == str(Shape(64, 192, 320, r=16)) and "bfloat16" in str(values["dtype"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.nodeid.startswith(_FOLDERS):
        # A module whose tests start processes of their own sets SCHEDULES to one.
        metafunc.parametrize("_schedule", getattr(metafunc.module, "SCHEDULES", SCHEDULES), indirect=True)


@pytest.fixture(autouse=True)
def _schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set the schedule of the streams for a test."""
    DEVICE.set_schedule(getattr(request, "param", "eager"))
    yield
    DEVICE.set_schedule("eager")


@pytest.fixture
def device() -> fake_cuda.FakeDevice:
    """The control object of the fake devices."""
    return DEVICE
