"""The free memory that tests see respects the limit of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import free_memory


@pytest.mark.parametrize(
    ("group", "names", "counts"),
    [
        ("", ("memory.max", "memory.current"), "anon 7\ninactive_file 50\n"),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "cache 60\ntotal_inactive_file 50\n"),
    ],
    ids=["version 2", "version 1"],
)
def test_limit_of_a_control_group_binds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str, names: tuple[str, str], counts: str
) -> None:
    """The limit of an outer group binds too, and the cache that the system can reclaim counts as free."""
    monkeypatch.setattr(free_memory, "_own_group", lambda controller: "outer/inner")
    outer = tmp_path / group / "outer"
    (outer / "inner").mkdir(parents=True)
    for name, text in ((names[0], "1000\n"), (names[1], "300\n"), ("memory.stat", counts)):
        (outer / name).write_text(text)
    assert list(free_memory._left_in_groups(tmp_path)) == [750]


def test_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(free_memory, "_own_group", lambda controller: "")
    for name, text in (("memory.max", "max\n"), ("memory.current", "300\n"), ("memory.stat", "")):
        (tmp_path / name).write_text(text)
    assert list(free_memory._left_in_groups(tmp_path)) == []
