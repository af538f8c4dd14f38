"""These tests interpret kernels in a separate process: `TRITON_INTERPRET=1 pytest tests/triton`.

The variable must be set before a module with @triton.jit is imported, and it applies to every kernel of the process. An
ordinary run therefore skips these tests with a reason.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Ignore every test of this folder in processes without the interpreter."""
    return True if not INTERPRETED and collection_path.name.startswith("test_") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run under the interpreter."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.interpreter)
