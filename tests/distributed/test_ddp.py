"""DistributedDataParallel with two processes on the CPU."""

from __future__ import annotations

import pytest

from tests.distributed.processes import names, run

MODULE = "tests.distributed.checks_ddp"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run([MODULE], [2], tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("check", names(MODULE))
def test_ddp(results, check):
    error = results[f"{check} with 2 processes"]
    assert not error, error
