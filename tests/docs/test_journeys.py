"""The table of journeys names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_journey_names_existing_tests():
    rows = [line for line in (ROOT / "docs" / "journeys.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 9
    for row in rows:
        journey, run_by, _, date, result = (cell.strip() for cell in row.strip("|").split("|"))
        named = re.findall(r"`([\w/]+\.py)`", run_by)
        assert named, journey
        folder = Path(named[0]).parent
        assert all((ROOT / name).is_file() or (ROOT / folder / name).is_file() for name in named), journey
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date), journey
        assert result, journey
