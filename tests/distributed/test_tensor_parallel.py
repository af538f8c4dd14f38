"""Tensor-parallel NF4 layers, with 2 and 4 processes on the CPU."""

from __future__ import annotations

import pytest

from tests.distributed.processes import names, run

MODULE = "tests.distributed.checks_tensor_parallel"
WORLDS = [2, 4]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run([MODULE], WORLDS, tmp_path_factory.mktemp("tensor_parallel"))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", names(MODULE))
def test_tensor_parallel(results, check, world):
    error = results[f"{check} with {world} processes"]
    assert not error, error
