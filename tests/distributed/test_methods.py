"""Every PEFT method under FSDP2, with two processes on the CPU."""

from __future__ import annotations

import pytest

from tests.distributed.processes import names, run

MODULE = "tests.distributed.checks_methods"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(MODULE, [2], tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("check", names(MODULE))
def test_method(results, check):
    error = results[f"{check} with 2 processes"]
    assert not error, error
