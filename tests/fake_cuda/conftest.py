"""Tests that need a CUDA build of torch on the fake device (tests/support/fake_cuda): `make test-cuda-torch`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fake_cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests in a process whose torch uses the real machine."""
    if fake_cuda.active() is not None:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs the fake CUDA device: make test-cuda-torch"))


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Keep the garbage collector from freeing memory of earlier tests while a test counts memory and runtime calls."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
