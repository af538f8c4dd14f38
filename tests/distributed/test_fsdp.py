"""FSDP2 over NF4 weights, with 2, 3 and 4 processes on the CPU."""

from __future__ import annotations

import pytest

from tests.distributed.processes import WORLDS, names, run

MODULES = [f"tests.distributed.checks_{subject}" for subject in ("fsdp", "state", "options")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(MODULES, WORLDS, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", names(*MODULES))
def test_fsdp(results, check, world):
    error = results[f"{check} with {world} processes"]
    assert not error, error
