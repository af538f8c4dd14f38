"""Imports PEFT, the reference where it is right, once, because its import is slow and prints warnings."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


@pytest.fixture(scope="session")
def hf_peft():
    return pytest.importorskip("peft", reason="dev dependency peft is not installed")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def clone():
    return copy.deepcopy
