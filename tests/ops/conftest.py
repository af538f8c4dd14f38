"""Selects the cases of the Triton backend, whose interpreter takes up to a second for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pairwise import keep_pairwise


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run Triton's kernels with cases that cover every pair of values; the compiled backends run all cases.

    tests/triton has further cases of every kernel and plan.
    """
    here = Path(__file__).parent

    def interpreted(item: pytest.Item) -> bool:
        return here in item.path.parents and item.callspec.params.get("backend") == "triton"  # type: ignore[attr-defined]

    config.hook.pytest_deselected(items=keep_pairwise(items, interpreted))
