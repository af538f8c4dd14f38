"""Compiles the emulated kernels of the collected tests before the first of them runs, on all cores."""

from __future__ import annotations

import pytest

from tests.support import cuda_host

from .launching import kernels_of, source


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
