"""pytest -p tests.support.fake_cuda.pytest_plugin: two fake devices, and each GPU test under every schedule."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support import fake_cuda
from tests.support.fake_cuda.device import SCHEDULES

DEVICE = fake_cuda.activate(devices=2, log=os.environ.get("FAKE_CUDA_LOG", ""))

from tests.support.fake_cuda import host_ops  # noqa: E402 - imports torch

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
    if values.get("backend") == "triton":
        return "each shape would take a minute to compile; tests/fake_cuda/test_triton.py has small ones"
    if "test_compiles_without_graph_breaks" in item.nodeid:
        return "Inductor's kernels are Triton's"
    if values.get("numel", 0) >= _LARGEST_WEIGHT or (shape is not None and shape.N * shape.K >= _LARGEST_WEIGHT):
        return "too large for the emulator"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.nodeid.startswith(_FOLDERS):
        metafunc.parametrize("_schedule", SCHEDULES, indirect=True)


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
