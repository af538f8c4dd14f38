"""Selects the emulated cases, and compiles their kernels before the first of them runs, on all cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import cuda_host
from tests.support.pairwise import keep_pairwise

from .launching import kernels_of, source


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the emulator with cases that cover every pair of mode, dtype and problem, because sanitizers are slow."""
    here = Path(__file__).parent

    def emulated(item: pytest.Item) -> bool:
        return here in item.path.parents and "mode" in item.callspec.params  # type: ignore[attr-defined]

    config.hook.pytest_deselected(items=keep_pairwise(items, emulated))


@pytest.fixture(scope="session", autouse=True)
def _prebuilt(request: pytest.FixtureRequest) -> None:
    if cuda_host.nvcc_missing() is not None:
        return
    needed = set()
    for item in request.session.items:
        stem, parameters = item.path.stem.removeprefix("test_"), getattr(item, "callspec", None)
        mode = parameters and parameters.params.get("mode")
        if mode and source(stem)[0].exists():
            needed.add((stem, mode))
    cuda_host.prebuild((source(stem)[0], mode, kernels_of(stem, mode)) for stem, mode in sorted(needed))
