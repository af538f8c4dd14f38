"""These tests interpret kernels: `TRITON_INTERPRET=1 pytest tests/triton`, a process of its own.

The variable must stand before a module with @triton.jit is imported, and it turns every kernel of the process into an
interpreted one; so an ordinary run collects none of them and says so.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave every test of this folder to its own process."""
    return True if not INTERPRETED and collection_path.name.startswith("test_") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs under the interpreter."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.interpreter)
