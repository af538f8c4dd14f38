"""Imports PEFT, the reference where it is right, once, because its import is slow and prints warnings."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


@pytest.fixture(scope="session")
def hf_peft():
    peft = pytest.importorskip("peft", reason="dev dependency peft is not installed")
    # PEFT would try to build a CUDA library for BOFT and, where it fails, leave CC=gcc and CXX=gcc in the environment
    # of the tests that follow.
    patch = pytest.MonkeyPatch()
    patch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    yield peft
    patch.undo()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def clone():
    return copy.deepcopy
