"""Fixtures of several files about PagedAdamW."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["resident", "mapped"])
def where(request, tmp_path):
    """Keyword arguments that determine where the states are stored."""
    return {"page_dir": tmp_path} if request.param == "mapped" else {}
