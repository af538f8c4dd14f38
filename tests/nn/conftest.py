"""Fixtures that choose how fused attention and MLP run: by the ops, or by nodes that run the kernels of the ops."""

from __future__ import annotations

import pytest

from qlora_kernels.ops import residual_block


@pytest.fixture
def by_ops(monkeypatch):
    """Return a function that makes every call run on the ops."""
    return lambda: monkeypatch.setattr(residual_block, "run_as_one_node", lambda *_: False)


@pytest.fixture
def by_kernels(monkeypatch):
    """Return a function that makes nodes run the kernels of their ops instead of the kernel of a whole block."""
    return lambda: monkeypatch.setattr(residual_block, "find", lambda problem: None)
