"""Transformers models with two processes on the CPU: PEFT methods, folders, fused parts and Trainer."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")

from tests.distributed.processes import names, run

MODULES = [f"tests.distributed.checks_{subject}" for subject in ("methods", "folders", "fused", "trainer")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(MODULES, [2], tmp_path_factory.mktemp("transformers"))


@pytest.mark.parametrize("check", names(*MODULES))
def test_transformers(results, check):
    error = results[f"{check} with 2 processes"]
    assert not error, error
